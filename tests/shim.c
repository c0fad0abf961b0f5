// Preloaded into the program, this makes system calls fail. FAULT says which and how:
//   CALL:N:ERRNO        call number N of CALL fails
//   CALL:N:stop         the process stops itself (SIGSTOP) before it
//   CALL@END:ERRNO      every call of CALL on a file whose path ends in END fails
//   fstat@END:grown     such a file looks longer than it is: it has shrunk since
//   short               reads and writes handle half, every third of them is interrupted
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_int calls;

static int ends_in(const char *path, const char *end, size_t n) {
    size_t len = strlen(path);
    return len >= n && !strncmp(path + len - n, end, n);
}

// Is this call one that fails? Sets errno. n: the size it asks for, or NULL.
static int fails(const char *call, const char *path, size_t *n) {
    const char *f = getenv("FAULT");
    size_t len = strlen(call);
    if (!f) return 0;
    if (!strcmp(f, "short")) {
        if (n && ++calls % 3 == 0) return errno = EINTR;
        if (n && *n > 1) *n /= 2;
        return 0;
    }
    if (strncmp(f, call, len)) return 0;
    const char *colon = strchr(f, ':');
    if (f[len] == ':') {
        const char *what = strrchr(f, ':') + 1;
        if (++calls != atoi(f + len + 1)) return 0;
        if (!strcmp(what, "stop")) return raise(SIGSTOP);       // 0 when it goes on
        return errno = atoi(what);
    }
    if (f[len] != '@' || !path || !ends_in(path, f + len + 1, (size_t)(colon - f) - len - 1)) return 0;
    return errno = atoi(colon + 1);
}

static const char *path_of(int fd, char path[static 4096]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    path[n > 0 ? n : 0] = 0;
    return path;
}

#define REAL(name) static typeof(&name) real; if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name)

int open(const char *path, int flags, ...) {
    REAL(open);
    va_list ap;
    va_start(ap, flags);
    mode_t mode = va_arg(ap, mode_t);
    va_end(ap);
    return fails("open", path, NULL) ? -1 : real(path, flags, mode);
}

int fstat(int fd, struct stat *st) {
    REAL(fstat);
    char path[4096];
    const char *f = getenv("FAULT");
    if (!f || strncmp(f, "fstat", 5)) return real(fd, st);
    int e = fails("fstat", path_of(fd, path), NULL), result = real(fd, st);
    const char *colon = strchr(f, ':');
    if (strcmp(colon, ":grown")) return e ? errno = e, -1 : result;
    if (ends_in(path, f + 6, (size_t)(colon - f) - 6)) st->st_size += 1 << 16;
    return result;
}

void *mmap(void *, size_t, int, int, int, off_t);
void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    REAL(mmap);
    char path[4096];
    const char *f = fd >= 0 ? getenv("FAULT") : NULL;
    if (f && !strncmp(f, "mmap", 4) && fails("mmap", path_of(fd, path), NULL)) return (void *)-1;
    return real(at, n, prot, flags, fd, offset);
}

ssize_t read(int fd, void *p, size_t n) {
    REAL(read);
    char path[4096];
    return fails("read", path_of(fd, path), &n) ? -1 : real(fd, p, n);
}

ssize_t pread(int fd, void *p, size_t n, off_t o) { REAL(pread); return fails("pread", NULL, &n) ? -1 : real(fd, p, n, o); }
ssize_t pwrite(int fd, const void *p, size_t n, off_t o) { REAL(pwrite); return fails("pwrite", NULL, &n) ? -1 : real(fd, p, n, o); }
int fsync(int fd) { REAL(fsync); return fails("fsync", NULL, NULL) ? -1 : real(fd); }
int rename(const char *a, const char *b) { REAL(rename); return fails("rename", NULL, NULL) ? -1 : real(a, b); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); return fails("mkdir", NULL, NULL) ? -1 : real(a, m); }
int unlink(const char *a) { REAL(unlink); return fails("unlink", NULL, NULL) ? -1 : real(a); }
