/* report.c: counters per kernel, and times computed from them by a stated model.
 *
 * The counters are exact. The times are not measurements: they are what the bottleneck below would
 * take on a card with the constants of the table, and everything printed calls them "computed". */
#include "api.h"
#include <ctype.h>
#include <math.h>
#include <unistd.h>

/* Data sheet values; tensor rates are those with 32-bit accumulation. */
typedef struct {
    const char *name;
    double dram_gbs, clock_ghz;
    int sms;
    double half_tflops, int8_tops;
} Card;

static const Card cards[] = {
    { "RTX 3090", 936, 1.695, SM_COUNT_3090, 71, 284 },
    { "RTX A5000", 768, 1.695, SM_COUNT_A5000, 111, 222 },
};
enum { N_CARDS = 2 };

static const double dram_share = 0.85;  /* of the data sheet's bandwidth that a good kernel gets */
static const double floor_us = 3;       /* no kernel is shorter */
static const double gap_us = 1.25;      /* between dependent launches */
static const double hop_us = 25;        /* from device to device through the host */
static const double pcie_gbs = 25;      /* 4.0 x16, one direction */

typedef enum { B_DRAM, B_ISSUE, B_TENSOR, B_FLOOR, N_BOUNDS } Bound;
static const char *bound_name[] = { "dram", "issue", "tensor", "floor" };

/* Times are sums of whole picoseconds, so that they do not depend on the order of launches. */
struct KernelStats {
    char *name;
    const Module *module;
    int registers, threads;              /* threads of the largest block launched */
    uint32_t shared, local, max_dynamic; /* bytes; the largest dynamic part of any launch */
    SimCounters sum;
    uint64_t ps[N_CARDS], bound[N_CARDS][N_BOUNDS];
    KernelStats *next;                   /* sorted by name */
};

static KernelStats *kernels;
static struct { uint64_t launches, ps[N_CARDS]; } devices[SIM_MAX_DEVICES];
static struct { uint64_t count, bytes; } copies[3]; /* to a device, from one, between devices */
static uint64_t hops, findings[SIM_N_KINDS];

int report_sms(void) {
    return strstr(config.name, "A5000") ? SM_COUNT_A5000 : SM_COUNT_3090;
}

/* Resident blocks by registers (units of 256 per warp, warps in fours), shared memory (units of
 * 128 bytes, 1 KB of each block reserved), warps and block slots of compute capability 8.6. */
int occupancy_blocks(int registers, int threads, uint64_t shared_bytes) {
    int warps = (threads + 31) / 32;
    int unit = (registers * 32 + 255) / 256 * 256;
    int fit = unit ? REGS_PER_SM / unit / 4 * 4 / warps : BLOCKS_PER_SM;
    if (fit > WARPS_PER_SM / warps) fit = WARPS_PER_SM / warps;
    if (fit > BLOCKS_PER_SM) fit = BLOCKS_PER_SM;
    uint64_t block = (shared_bytes + SHARED_RESERVED + 127) / 128 * 128;
    if ((uint64_t)fit > SHARED_PER_SM / block) fit = (int)(SHARED_PER_SM / block);
    return fit;
}

/* ---- collecting */

KernelStats *stats_of(const Func *func) {
    KernelStats **at = &kernels;
    while (*at && strcmp((*at)->name, func->kernel->name) < 0) at = &(*at)->next;
    if (*at && !strcmp((*at)->name, func->kernel->name)) return *at;
    KernelStats *k = zalloc(sizeof *k);
    k->name = strdup(func->kernel->name);
    k->module = func->module;
    k->registers = func->kernel->registers;
    k->shared = func->kernel->shared_bytes;
    k->local = func->kernel->local_bytes;
    k->next = *at;
    return *at = k;
}

/* Bytes of DRAM traffic: each sector of a launch once. */
static double dram_bytes(const SimCounters *c) {
    return 32.0 * (double)(c->unique_load_sectors + c->unique_store_sectors);
}

/* Computed time of one launch in us, and what it is bound by. */
static double model(const Card *card, const SimCounters *c, Bound *bound) {
    double t[N_BOUNDS] = {
        [B_DRAM] = dram_bytes(c) / (dram_share * card->dram_gbs * 1e3),
        [B_ISSUE] = (double)sim_class_sum(c->warp) / (card->sms * 4 * card->clock_ghz * 1e3),
        [B_TENSOR] = 2.0 * (double)c->mma_half_mac / (card->half_tflops * 1e6) +
                     2.0 * (double)c->mma_int_mac / (card->int8_tops * 1e6),
        [B_FLOOR] = floor_us,
    };
    *bound = B_DRAM;
    for (int i = 1; i < N_BOUNDS; i++)
        if (t[i] > t[*bound]) *bound = (Bound)i;
    return t[*bound];
}

/* Adds one launch; its computed time in us on the card that the devices pretend to be. */
double stats_launch(KernelStats *k, const Work *w, const SimCounters *c) {
    int threads = (int)(w->launch.block[0] * w->launch.block[1] * w->launch.block[2]);
    double mine = 0;
    sim_counters_add(&k->sum, c);
    if (threads > k->threads) k->threads = threads;
    if (w->launch.dynamic_shared > k->max_dynamic) k->max_dynamic = w->launch.dynamic_shared;
    devices[w->ctx->device].launches++;
    for (int i = 0; i < N_CARDS; i++) {
        Bound b;
        double us = model(&cards[i], c, &b);
        uint64_t ps = (uint64_t)llround(us * 1e6);
        k->ps[i] += ps;
        k->bound[i][b] += ps;
        devices[w->ctx->device].ps[i] += ps;
        if (cards[i].sms == report_sms()) mine = us;
    }
    return mine;
}

double stats_copy(int src_dev, int dst_dev, uint64_t bytes) {
    int kind = src_dev < 0 ? 0 : dst_dev < 0 ? 1 : 2;
    copies[kind].count++;
    copies[kind].bytes += bytes;
    bool inside = src_dev == dst_dev; /* on the card: read and written by its DRAM */
    double gbs = inside ? cards[0].dram_gbs * dram_share / 2 : pcie_gbs;
    return (double)bytes / (gbs * 1e3);
}

double computed_set(uint64_t bytes) {
    return (double)bytes / (cards[0].dram_gbs * dram_share * 1e3);
}

void stats_hop(void) {
    hops++;
}

/* Every finding is printed, up to a limit, and counted by kind. */
static void on_finding(void *user, const SimFinding *f) {
    char line[800];
    (void)user;
    uint64_t n = ++findings[f->kind];
    if (n <= 20) fprintf(stderr, "sim: %s\n", sim_finding_text(f, line, sizeof line));
    if (n == 20) fprintf(stderr, "sim: further findings of this kind are only counted\n");
}

__attribute__((constructor)) static void start(void) {
    sim_set_sink(on_finding, NULL);
}

/* ---- registers as ptxas allots them, where SIM_PTXAS names one */

/* Reads "Compiling entry function 'name'" and "Used N registers" from ptxas -v. */
static void read_ptxas(FILE *in) {
    char line[512], name[256] = "";
    while (fgets(line, sizeof line, in)) {
        int registers;
        char *p = strstr(line, "entry function '"), *used = strstr(line, "Used ");
        if (p) sscanf(p + 16, "%255[^']", name);
        if (!used || sscanf(used, "Used %d registers", &registers) != 1) continue;
        for (KernelStats *k = kernels; k; k = k->next)
            if (!strcmp(k->name, name)) k->registers = registers;
    }
}

/* One run for each module. */
static void ask_ptxas(const char *ptxas) {
    for (KernelStats *k = kernels, *l; k; k = k->next) {
        for (l = kernels; l != k && l->module != k->module;) l = l->next;
        if (l != k) continue; /* this module has been asked about */
        char file[] = "/tmp/sim-XXXXXX", command[1200];
        int fd = mkstemp(file);
        if (fd < 0) return;
        FILE *out = fdopen(fd, "w");
        if (out) {
            fputs(k->module->text, out);
            fclose(out);
        }
        snprintf(command, sizeof command, "unset LD_LIBRARY_PATH; '%s' -v -arch=sm_86 -o /dev/null "
                 "%s 2>&1", ptxas, file);
        FILE *in = popen(command, "r");
        if (in) read_ptxas(in);
        if (in) pclose(in);
        unlink(file);
    }
}

/* ---- writing */

static double us_of(uint64_t ps) {
    return (double)ps * 1e-6;
}

/* Warps per multiprocessor, of 48, with the largest block and shared memory of any launch. */
static int occupancy(const KernelStats *k) {
    return occupancy_blocks(k->registers, k->threads, k->shared + k->max_dynamic) *
           ((k->threads + 31) / 32);
}

/* A list of "name": number for JSON. */
typedef struct {
    const char *name;
    uint64_t n;
} Number;

static void put_numbers(FILE *f, const Number *list, size_t n, const char *separator) {
    for (size_t i = 0; i < n; i++)
        fprintf(f, "%s\"%s\": %lu", i ? separator : "", list[i].name, list[i].n);
}
#define PUT_NUMBERS(f, separator, ...)                                                             \
    put_numbers(f, (Number[]){ __VA_ARGS__ }, sizeof(Number[]){ __VA_ARGS__ } / sizeof(Number),    \
                separator)

/* By bytes per thread: how often, how much, in how many sectors. */
static void put_access(FILE *f, const char *name, const SimAccess *a) {
    fprintf(f, "      \"%s\": {", name);
    for (int w = 0; w < SIM_N_WIDTHS; w++) {
        fprintf(f, "%s\"%d\": {", w ? ", " : "", 1 << w);
        PUT_NUMBERS(f, ", ", { "warp", a[w].warp }, { "lane", a[w].lane }, { "bytes", a[w].bytes },
                    { "sectors", a[w].sectors });
        fprintf(f, "}");
    }
    fprintf(f, "},\n");
}

static void put_computed(FILE *f, const KernelStats *k) {
    fprintf(f, "      \"computed_us\": {");
    for (int i = 0; i < N_CARDS; i++) {
        fprintf(f, "%s\"%s\": {\"total\": %.6f", i ? ", " : "", cards[i].name, us_of(k->ps[i]));
        for (int b = 0; b < N_BOUNDS; b++)
            fprintf(f, ", \"bound_by_%s\": %.6f", bound_name[b], us_of(k->bound[i][b]));
        fprintf(f, "}");
    }
    fprintf(f, "}\n");
}

static void put_kernel(FILE *f, const KernelStats *k, bool ptxas, bool first) {
    const SimCounters *c = &k->sum;
    Number classes[SIM_N_CLASSES];
    fprintf(f, "%s    \"%s\": {\n      ", first ? "" : ",\n", k->name);
    PUT_NUMBERS(f, ",\n      ",
        { "launches", c->launches }, { "blocks", c->blocks }, { "threads", c->threads },
        { "warp_instructions", sim_class_sum(c->warp) },
        { "lane_instructions", sim_class_sum(c->lane) },
        { "unique_load_bytes", 32 * c->unique_load_sectors },
        { "unique_store_bytes", 32 * c->unique_store_sectors },
        { "shared_accesses", c->shared_accesses }, { "shared_passes", c->shared_passes },
        { "shared_ideal", c->shared_ideal }, { "barriers", c->barriers },
        { "atomics", c->atomics }, { "divergent_branches", c->divergent },
        { "mma_half", c->mma_half }, { "mma_int", c->mma_int },
        { "mma_half_mac", c->mma_half_mac }, { "mma_int_mac", c->mma_int_mac },
        { "registers", (uint64_t)k->registers }, { "shared_static_bytes", k->shared },
        { "shared_dynamic_bytes", k->max_dynamic }, { "local_bytes", k->local },
        { "occupancy_warps", (uint64_t)occupancy(k) });
    fprintf(f, ",\n      \"registers_from\": \"%s\",\n      \"warp\": {",
            ptxas ? "ptxas" : "estimate");
    for (int i = 0; i < SIM_N_CLASSES; i++)
        classes[i] = (Number){ sim_class_names[i], c->warp[i] };
    put_numbers(f, classes, SIM_N_CLASSES, ", ");
    fprintf(f, "},\n");
    put_access(f, "load", c->load);
    put_access(f, "store", c->store);
    put_computed(f, k);
    fprintf(f, "    }");
}

static void put_totals(FILE *f) {
    static const char *way[] = { "to_device", "from_device", "between" };
    Number found[SIM_N_KINDS];
    uint64_t launches = 0;
    size_t n = 0;
    fprintf(f, "  \"devices\": [");
    for (int d = 0; d < config.devices; d++) {
        launches += devices[d].launches;
        fprintf(f, "%s{\"launches\": %lu, \"computed_kernel_us\": {", d ? ", " : "",
                devices[d].launches);
        for (int i = 0; i < N_CARDS; i++)
            fprintf(f, "%s\"%s\": %.6f", i ? ", " : "", cards[i].name, us_of(devices[d].ps[i]));
        fprintf(f, "}}");
    }
    fprintf(f, "],\n  \"copies\": {");
    for (int i = 0; i < 3; i++)
        fprintf(f, "%s\"%s\": {\"count\": %lu, \"bytes\": %lu}", i ? ", " : "", way[i],
                copies[i].count, copies[i].bytes);
    fprintf(f, "},\n  \"launches\": %lu, \"computed_gaps_us\": %.2f,\n  \"hops\": %lu, "
            "\"computed_hops_us\": %.1f,\n  \"findings\": {", launches,
            (double)launches * gap_us, hops, (double)hops * hop_us);
    for (int i = 0; i < SIM_N_KINDS; i++)
        if (findings[i]) found[n++] = (Number){ sim_kind_names[i], findings[i] };
    put_numbers(f, found, n, ", ");
    fprintf(f, "},\n");
}

static void put_json(FILE *f, bool ptxas) {
    bool first = true;
    fprintf(f, "{\n  \"device\": \"%s\",\n  \"model\": \"computed, not measured: per launch max("
            "unique bytes / (%.2f x DRAM bandwidth), warp instructions / issue rate, tensor "
            "operations / rate, %.0f us); gaps of %.2f us and hops of %.0f us apart\",\n",
            config.name, dram_share, floor_us, gap_us, hop_us);
    put_totals(f);
    fprintf(f, "  \"kernels\": {\n");
    for (KernelStats *k = kernels; k; k = k->next) {
        if (!k->sum.launches) continue;
        put_kernel(f, k, ptxas, first);
        first = false;
    }
    fprintf(f, "\n  }\n}\n");
}

static double ratio(uint64_t a, uint64_t b) {
    return b ? (double)a / (double)b : 0;
}

/* sect: 32-byte sectors touched over bytes asked for / 32; bank: passes over the ideal. */
static void put_table(FILE *f, bool ptxas) {
    uint64_t launches = 0, ps[N_CARDS] = { 0 };
    fprintf(f, "%s; times are computed, not measured (registers: %s)\n", config.name,
            ptxas ? "ptxas" : "estimate");
    fprintf(f, "%-28s %8s %10s %10s %9s %9s %5s %5s %4s %4s %10s %10s\n", "kernel", "launches",
            "warp inst", "lane inst", "MB read", "MB writ", "sect", "bank", "regs", "occ",
            "us 3090", "us A5000");
    for (KernelStats *k = kernels; k; k = k->next) {
        const SimCounters *c = &k->sum;
        uint64_t bytes = 0, sectors = 0;
        if (!c->launches) continue;
        for (int w = 0; w < SIM_N_WIDTHS; w++) {
            bytes += c->load[w].bytes + c->store[w].bytes;
            sectors += c->load[w].sectors + c->store[w].sectors;
        }
        fprintf(f, "%-28s %8lu %10lu %10lu %9.3f %9.3f %5.2f %5.2f %4d %4d %10.2f %10.2f\n",
                k->name, c->launches, sim_class_sum(c->warp), sim_class_sum(c->lane),
                (double)c->unique_load_sectors * 32e-6, (double)c->unique_store_sectors * 32e-6,
                ratio(32 * sectors, bytes), ratio(c->shared_passes, c->shared_ideal), k->registers,
                occupancy(k), us_of(k->ps[0]), us_of(k->ps[1]));
        launches += c->launches;
        for (int i = 0; i < N_CARDS; i++) ps[i] += k->ps[i];
    }
    fprintf(f, "sect: sectors touched x 32 / bytes asked for by threads; bank: shared passes / "
            "ideal; occ: warps of %d\n", WARPS_PER_SM);
    fprintf(f, "sum of kernels: computed %.2f us (3090), %.2f us (A5000); apart from that %lu gaps "
            "(computed %.1f us) and %lu hops (computed %.1f us)\n", us_of(ps[0]), us_of(ps[1]),
            launches, (double)launches * gap_us, hops, (double)hops * hop_us);
}

/* Writes the report so far: JSON, or the table if the name ends in .txt or is "-" (stderr). Returns
 * 0, or 301 if the file cannot be written. */
EXPORT CUresult sim_write_report(const char *path) {
    const char *dot = strrchr(path, '.'), *ptxas = getenv("SIM_PTXAS");
    bool table = !strcmp(path, "-") || (dot && !strcmp(dot, ".txt")), ask = ptxas && *ptxas;
    FILE *f = strcmp(path, "-") ? fopen(path, "w") : stderr;
    if (!f) return E_FILE_NOT_FOUND;
    pthread_mutex_lock(&sim_lock);
    if (ask) ask_ptxas(ptxas);
    if (table) put_table(f, ask);
    else put_json(f, ask);
    pthread_mutex_unlock(&sim_lock);
    if (f != stderr && fclose(f)) return E_FILE_NOT_FOUND;
    return OK;
}

/* Forgets what was counted, to measure one part of a run. */
EXPORT void sim_reset_counters(void) {
    pthread_mutex_lock(&sim_lock);
    for (KernelStats *k = kernels; k; k = k->next) {
        memset(&k->sum, 0, sizeof k->sum);
        memset(k->ps, 0, sizeof k->ps);
        memset(k->bound, 0, sizeof k->bound);
    }
    memset(devices, 0, sizeof devices);
    memset(copies, 0, sizeof copies);
    hops = 0;
    pthread_mutex_unlock(&sim_lock);
}

/* Findings of all kinds so far. */
EXPORT uint64_t sim_findings(void) {
    uint64_t n = 0;
    pthread_mutex_lock(&sim_lock);
    for (int i = 0; i < SIM_N_KINDS; i++) n += findings[i];
    pthread_mutex_unlock(&sim_lock);
    return n;
}

__attribute__((destructor)) static void at_exit(void) {
    if (config.report && sim_write_report(config.report))
        fprintf(stderr, "sim: cannot write %s\n", config.report);
}
