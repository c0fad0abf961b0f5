// What the system gives: files mapped into memory, NUMA nodes, and signals. And the small model that
// travels in the program.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "dsv4.h"

// --- the built-in model: files with paths that no other file can have

__asm__(".pushsection .rodata\n"
        "tiny_config: .incbin \"models/tiny/config.json\"\n"
        "tiny_sampling: .incbin \"models/tiny/generation_config.json\"\n"
        "tiny_tokenizer: .incbin \"models/tiny/tokenizer.json\"\n"
        "tiny_weights: .incbin \"models/tiny/model-00001-of-00001.safetensors\"\n"
        "tiny_end: .byte 0\n"
        ".popsection\n");
extern const char tiny_config[], tiny_sampling[], tiny_tokenizer[], tiny_weights[], tiny_end[];
static const struct { const char *path, *from, *to; } built_in[] = {
    { BUILT_IN "/config.json", tiny_config, tiny_sampling },
    { BUILT_IN "/generation_config.json", tiny_sampling, tiny_tokenizer },
    { BUILT_IN "/tokenizer.json", tiny_tokenizer, tiny_weights },
    { BUILT_IN "/model.safetensors", tiny_weights, tiny_end },
};

// A built-in file's bytes; p is NULL if the path is another's.
static Span built_in_file(const char *path) {
    for (size_t i = 0; i < COUNT(built_in); i++)
        if (!strcmp(path, built_in[i].path))
            return (Span){ built_in[i].from, (size_t)(built_in[i].to - built_in[i].from) };
    return (Span){ 0 };
}

// --- mapped files

bool file_exists(const char *path) { return built_in_file(path).p || !access(path, F_OK); }

// What is mapped, for the handler of SIGBUS.
typedef struct Mapped Mapped;
struct Mapped { Mapped *next; Span map; char path[]; };
static Mapped *mapped;

static bool map_bytes(const char *path, Span *out, Err *e) {
    struct stat st;
    void *p = "";
    Span own = built_in_file(path);
    if (own.p) {
        p = mmap(NULL, own.n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) return fail(e, "%s: cannot map: %s", path, strerror(errno));
        *out = (Span){ memcpy(p, own.p, own.n), own.n };
        return true;
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);     // a FIFO must not hold us up
    if (fd < 0) return fail(e, "%s: %s", path, strerror(errno));
    bool known = !fstat(fd, &st), regular = known && S_ISREG(st.st_mode);
    if (regular && st.st_size) p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int err = errno;
    close(fd);
    if (!regular) return fail(e, "%s: %s", path, known ? "not a regular file" : strerror(err));
    if (p == MAP_FAILED) return fail(e, "%s: cannot map: %s", path, strerror(err));
    *out = (Span){ p, (size_t)st.st_size };
    return true;
}

bool map_file(const char *path, Span *out, Err *e) {
    if (!map_bytes(path, out, e)) return false;
    Mapped *m = xalloc(1, sizeof *m + strlen(path) + 1);
    m->map = *out;
    m->next = mapped;
    strcpy(m->path, path);
    mapped = m;
    return true;
}

void unmap_file(Span map) {
    for (Mapped **link = &mapped, *m; (m = *link); link = &m->next) {
        if (m->map.p != map.p || m->map.n != map.n) continue;
        *link = m->next;
        free(m);
        break;
    }
    if (map.n) munmap((void *)(uintptr_t)map.p, map.n);
}

const char *mapped_path(const void *addr) {
    for (const Mapped *m = mapped; m; m = m->next) {
        size_t at = (uintptr_t)addr - (uintptr_t)m->map.p;
        if (at < ((m->map.n + 4095) & ~(size_t)4095)) return m->path;      // whole pages
    }
    return NULL;
}

// --- NUMA: a node of memory and the cores next to it

// A node's cores that this thread may use; the file says "0-3,8-11". Returns how many.
static int node_set(int node, cpu_set_t *set) {
    char path[64];
    int from, to;
    cpu_set_t may;
    CPU_ZERO(set);
    snprintf(path, sizeof path, "/sys/devices/system/node/node%d/cpulist", node);
    FILE *f = fopen(path, "r");
    if (!f || sched_getaffinity(0, sizeof may, &may)) CPU_ZERO(&may);
    while (f && fscanf(f, "%d", &from) == 1) {
        if (fscanf(f, "-%d", &to) != 1) to = from;
        for (; from <= to; from++)
            if (CPU_ISSET(from, &may)) CPU_SET(from, set);
        if (fgetc(f) != ',') break;
    }
    if (f) fclose(f);
    return CPU_COUNT(set);
}

int node_cores(int node) {
    cpu_set_t set;
    return node_set(node, &set);
}

bool keep_to_node(int node) {
    cpu_set_t set;
    return node_set(node, &set) && !sched_setaffinity(0, sizeof set, &set);
}

// --- signals

volatile sig_atomic_t interrupted, terminated, computing;

static void on_interrupt(int sig) {
    if (sig != SIGINT) terminated = true;
    if (interrupted++ || !computing) _exit(130);
}

// A page of a mapped file that cannot be read.
static void on_bus(int sig, siginfo_t *info, void *context) {
    static atomic_flag said = ATOMIC_FLAG_INIT;
    while (atomic_flag_test_and_set(&said)) pause();
    const char *path = mapped_path(info->si_addr);
    const char *parts[] = { "dsv4: ", path ? path : "a mapped file",
                            ": cannot be read (did it shrink, or does its disk fail?)\n" };
    (void)sig;
    (void)context;
    for (int i = 0; i < 3; i++) if (write(2, parts[i], strlen(parts[i])) < 0) break;
    _exit(1);
}

void catch_signals(void) {
    static const int stops[] = { SIGINT, SIGTERM, SIGHUP };
    struct sigaction stop = { .sa_handler = on_interrupt };
    struct sigaction bus = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO };
    for (int i = 0; i < (int)COUNT(stops); i++) sigaction(stops[i], &stop, NULL);
    sigaction(SIGBUS, &bus, NULL);
    signal(SIGPIPE, SIG_IGN);
}
