// A model of random numbers, with one layer of each kind: what the kernels' tests run on. Include after dsv4.c.

typedef struct {
    Config c;
    Weights w;
    uint64_t state;
} Toy;

static float *toy_vec(Toy *m, size_t n, float base, float spread) {
    float *v = xalloc(n, sizeof *v);
    for (size_t i = 0; i < n; i++) v[i] = base + spread * random_signed(&m->state);
    return v;
}

// Random weights of a size that keeps y = W x near the size of x.
static Mat toy_mat(Toy *m, Format fmt, int n, int k) {
    Mat w = { .n = n, .k = k, .fmt = fmt };
    size_t bytes = row_bytes(&w) * (size_t)n, groups = (size_t)n * k / 32, blocks = (size_t)((n + 127) / 128) * ((k + 127) / 128);
    uint8_t *p = xalloc(bytes, 1), *s = xalloc((fmt == W_INT4 || fmt == W_FP4 ? groups : blocks) * 2, 1);
    float unit = 1.7f / sqrtf((float)k);
    int e = (int)floorf(log2f(unit)) + 127;
    for (size_t i = 0; i < bytes / 4 && fmt == W_F32; i++) ((float *)p)[i] = unit * random_signed(&m->state);
    for (size_t i = 0; i < bytes / 2 && fmt == W_BF16; i++) ((bf16 *)p)[i] = bf16_of_f32(unit * random_signed(&m->state));
    for (size_t i = 0; i < bytes && fmt >= W_INT8; i++) {
        p[i] = (uint8_t)(int)(random_signed(&m->state) * 127.0f);
        if (fmt == W_FP8 && (p[i] & 0x7f) > 0x40) p[i] &= 0xbf;        // at most 2: far from NaN
    }
    for (size_t i = 0; i < blocks && fmt == W_INT8; i++) ((bf16 *)s)[i] = bf16_of_f32(unit / 127 * (1.5f + random_signed(&m->state)));
    for (size_t i = 0; i < groups && fmt == W_INT4; i++) ((bf16 *)s)[i] = bf16_of_f32(unit / 7 * (1.5f + random_signed(&m->state)));
    for (size_t i = 0; i < blocks && fmt == W_FP8; i++) s[i] = (uint8_t)(e + (random_signed(&m->state) > 0));
    for (size_t i = 0; i < groups && fmt == W_FP4; i++) s[i] = (uint8_t)(e - 2 + (random_signed(&m->state) > 0));
    w.w = p;
    w.s = fmt >= W_INT8 ? s : NULL;
    return w;
}

static Format toy_format(const char *name, Format dense) {
    static const char *const plain[] = { "compressor", "weights_proj", "gate", "embed", "head" };
    if (strstr(name, "_fn")) return W_F32;
    for (size_t i = 0; i < COUNT(plain); i++) if (strstr(name, plain[i])) return W_BF16;
    return strstr(name, "_proj") ? W_FP8 : dense;
}

// Fills what a table lists of one block.
static void toy_list(Toy *m, const Bind *table, size_t n, int ratio, bool hashed, Format dense, void *block) {
    const Config *c = &m->c;
    for (size_t i = 0; i < n; i++) {
        const Bind *b = table + i;
        void *field = (char *)block + b->at;
        bool skip = (b->when == COMPRESSED && !ratio) || (b->when == CSA && ratio != 4) || (b->when == HASHED && !hashed) ||
                    (b->when == SCORED && hashed), around_1 = strstr(b->name, "norm") || strstr(b->name, "scale");
        int rows = shape_of(b->rows, c, ratio), cols = b->cols ? shape_of(b->cols, c, ratio) : 1;
        if (skip) continue;
        if (b->kind == MAT) *(Mat *)field = toy_mat(m, toy_format(b->name, dense), rows, cols);
        if (b->kind == VEC) *(float **)field = toy_vec(m, (size_t)rows * cols, around_1, around_1 ? 0.5f : 1);
        if (b->kind != TABLE) continue;
        int64_t *t = xalloc((size_t)rows * cols, sizeof *t);
        for (int j = 0; j < rows * cols; j++) t[j] = (j / cols + j % cols) % c->n_experts;
        *(const int64_t **)field = t;
    }
}

static void toy_layer(Toy *m, Layer *l, int ratio, bool hashed, Format dense, Format expert) {
    const Config *c = &m->c;
    Mat **w[] = { &l->w1, &l->w2, &l->w3 };
    snprintf(l->name, sizeof l->name, "ratio %d", ratio);
    l->ratio = l->comp.ratio = l->icomp.ratio = ratio;
    l->comp.out = c->head_dim;
    l->icomp.out = c->index_dim;
    toy_list(m, layer_table, COUNT(layer_table), ratio, hashed, dense, l);
    if (!hashed) for (int e = 0; e < c->n_experts; e++) l->gate_bias[e] *= 0.2f;
    for (int i = 0; i < 3; i++) {
        *w[i] = xalloc((size_t)c->n_experts, sizeof(Mat));
        for (int e = 0; e < c->n_experts; e++)
            (*w[i])[e] = toy_mat(m, expert, i == 1 ? c->dim : c->expert_dim, i == 1 ? c->expert_dim : c->dim);
    }
}

// Layers of ratio 0 (hash-routed), 4 and 128, head and MTP layer. c holds the dimensions; the lists are made here.
static Toy *toy_new(const Config *c, Format dense, Format expert) {
    static const int ratio[] = { 0, 4, 128, 0 };
    Toy *m = xalloc(1, sizeof *m);
    m->c = *c;
    m->state = 1;
    m->c.n_layers = 3;
    m->c.n_mtp = 1;
    m->c.ratio = memcpy(xalloc(4, sizeof(int)), ratio, sizeof ratio);
    m->w.layers = xalloc(3, sizeof(Layer));
    m->w.mtp = xalloc(1, sizeof(Mtp));
    for (int i = 0; i < 4; i++) toy_layer(m, i < 3 ? &m->w.layers[i] : &m->w.mtp->block, ratio[i], i == 0, dense, expert);
    toy_list(m, model_table, COUNT(model_table), 0, false, dense, &m->w);
    toy_list(m, mtp_table, COUNT(mtp_table), 0, false, dense, m->w.mtp);
    return m;
}

// A stage that holds all of the toy, for T rows; cuda_device() or cpu_device() starts it.
static void toy_device(Device *d, Toy *m, const char *name, int T, int ctx) {
    snprintf(d->name, sizeof d->name, "%s", name);
    d->c = &m->c;
    d->w = m->w;
    d->last = m->c.n_layers;
    d->has_head = true;
    d->max_rows = T;
    d->ctx = ctx;
    d->ring = m->c.window + T + 8;
    d->cring[4] = 2 * 4 + T + 8;
    d->cring[128] = 128 + T + 8;
    for (int i = 0; i < 2; i++) d->inv_freq[i] = rope_frequencies(&m->c, i);
}
