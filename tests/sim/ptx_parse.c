/* ptx_parse.c: PTX text -> module. Tokens, directives, variables, scopes, functions.
 *
 * Functions that are called are read again at every call and become part of the caller (PTX from
 * a compiler has no recursion worth running); the parameters of such a call are bytes of the
 * thread's local memory, under the caller's name and the callee's name at once. */
#include "ptx_parser.h"

#include <ctype.h>
#include <stdarg.h>

/* ------------------------------------------------------------------------------------------------
 * memory that lives as long as the module */

struct Chunk {
    struct Chunk *next;
    size_t used, size;
    _Alignas(16) u8 bytes[];
};

/* Zeroed memory; the simulator does not outlive a host without memory. */
static void *xalloc(size_t bytes) {
    void *p = calloc(1, bytes);
    if (!p) {
        fprintf(stderr, "sim: out of host memory (%zu bytes)\n", bytes);
        abort();
    }
    return p;
}

void *arena_get(SimModule *m, size_t bytes) {
    bytes = (bytes + 15) & ~(size_t)15;
    if (!m->arena || m->arena->size - m->arena->used < bytes) {
        size_t size = bytes > 65536 ? bytes : 65536;
        struct Chunk *c = xalloc(sizeof *c + size);
        c->size = size;
        c->next = m->arena;
        m->arena = c;
    }
    void *p = m->arena->bytes + m->arena->used;
    m->arena->used += bytes;
    return p;
}

void *xgrow(void *array, u32 count, u32 *cap, size_t item) {
    if (count < *cap) return array;
    u32 more = *cap ? *cap * 2 : 16;
    array = realloc(array, more * item);
    if (!array) abort();
    memset((char *)array + *cap * item, 0, (more - *cap) * item);
    *cap = more;
    return array;
}

char *keep(Parser *p, const char *text) {
    size_t n = strlen(text) + 1;
    return memcpy(arena_get(p->m, n), text, n);
}

/* ------------------------------------------------------------------------------------------------
 * tokens */

/* Ends the parse: the line and the reason go to the log. */
void ptx_fail(Parser *p, const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    int n = p->log_size ? snprintf(p->log, p->log_size, "line %d: ", p->line) : 0;
    if (n >= 0 && (size_t)n < p->log_size)
        vsnprintf(p->log + n, p->log_size - (size_t)n, format, ap);
    va_end(ap);
    if (!p->error) p->error = SIM_ERROR_INVALID_PTX;
    longjmp(p->fail, 1);
}

/* White space and comments of both kinds. */
static void skip_blank(Parser *p) {
    for (; p->p < p->end; p->p++) {
        if (*p->p == '\n') {
            p->read_line++;
        } else if (p->p[0] == '/' && p->p + 1 < p->end && p->p[1] == '/') {
            while (p->p < p->end && *p->p != '\n') p->p++;
            p->p--;
        } else if (p->p[0] == '/' && p->p + 1 < p->end && p->p[1] == '*') {
            for (p->p += 2; p->p + 1 < p->end && !(p->p[0] == '*' && p->p[1] == '/'); p->p++)
                p->read_line += *p->p == '\n';
            p->p++;
        } else if (!isspace((unsigned char)*p->p)) {
            return;
        }
    }
}

/* Opcodes, names and registers are words: "ld.global.v4.u32", "%r1", "$L__BB0_2", "%tid.x". */
static bool word_char(const Parser *p, const char *c) {
    if (isalnum((unsigned char)*c) || *c == '_' || *c == '$' || *c == '.' || *c == '%') return true;
    /* the two colons of ".L1::no_allocate" */
    return *c == ':' && ((c + 1 < p->end && c[1] == ':' && isalnum((unsigned char)c[2])) ||
                         (c[-1] == ':' && isalnum((unsigned char)c[1]) && c[-2] != ' '));
}

static void read_word(Parser *p) {
    size_t n = 0;
    while (p->p < p->end && word_char(p, p->p)) {
        if (n + 1 == sizeof p->word) ptx_fail(p, "name longer than %zu bytes", sizeof p->word - 1);
        p->word[n++] = *p->p++;
    }
    p->word[n] = 0;
    p->tok = TOK_WORD;
}

/* 0f and 0d bit patterns, hexadecimal, binary, octal, decimal, decimal fractions. */
static void read_number(Parser *p) {
    char *stop;
    p->tok = TOK_NUMBER;
    p->is_float = false;
    p->float_bits = 0;
    if (p->p[0] == '0' && p->p[1] && strchr("fFdD", p->p[1])) {
        char digits[17] = {0};
        int n = strchr("fF", p->p[1]) ? 8 : 16;
        for (int i = 0; i < n && isxdigit((unsigned char)p->p[2 + i]); i++)
            digits[i] = p->p[2 + i];
        if ((int)strlen(digits) != n)
            ptx_fail(p, "floating-point constant needs %d hexadecimal digits", n);
        p->number = strtoull(digits, NULL, 16);
        p->float_bits = n * 4;
        p->is_float = true;
        p->p += 2 + n;
        return;
    }
    if (p->p[0] == '0' && (p->p[1] == 'b' || p->p[1] == 'B'))
        p->number = strtoull(p->p + 2, &stop, 2);
    else
        p->number = strtoull(p->p, &stop, 0);
    if (*stop == '.' || *stop == 'e' || *stop == 'E') {
        double d = strtod(p->p, &stop);
        memcpy(&p->number, &d, 8);
        p->float_bits = 64;
        p->is_float = true;
    }
    if (*stop == 'U') stop++;
    p->p = stop;
}

/* Reads the next token into tok, word, punct, number. */
void next(Parser *p) {
    skip_blank(p);
    p->line = p->read_line;
    if (p->p >= p->end) {
        p->tok = TOK_END;
        strcpy(p->word, "end of text");
        return;
    }
    char c = *p->p;
    if (isdigit((unsigned char)c)) {
        read_number(p);
    } else if (c == '"') {
        size_t n = 0;
        for (p->p++; p->p < p->end && *p->p != '"' && *p->p != '\n'; p->p++)
            if (n + 1 < sizeof p->word) p->word[n++] = *p->p;
        p->word[n] = 0;
        p->p += p->p < p->end;
        p->tok = TOK_STRING;
    } else if (c != ':' && word_char(p, p->p)) {
        read_word(p);
    } else {
        p->tok = TOK_PUNCT;
        p->punct = c;
        p->p++;
        snprintf(p->word, sizeof p->word, "%c", c);
    }
}

/* Takes the punctuation if it is the current token. */
bool accept(Parser *p, int punct) {
    if (p->tok != TOK_PUNCT || p->punct != punct) return false;
    next(p);
    return true;
}

void expect(Parser *p, int punct) {
    if (!accept(p, punct))
        ptx_fail(p, "expected '%c' before '%s'", punct, p->tok == TOK_NUMBER ? "number" : p->word);
}

bool accept_word(Parser *p, const char *word) {
    if (p->tok != TOK_WORD || strcmp(p->word, word)) return false;
    next(p);
    return true;
}

static u64 expect_number(Parser *p) {
    if (p->tok != TOK_NUMBER) ptx_fail(p, "expected a number before '%s'", p->word);
    u64 v = p->number;
    next(p);
    return v;
}

static const char *expect_name(Parser *p) {
    if (p->tok != TOK_WORD) ptx_fail(p, "expected a name");
    const char *name = keep(p, p->word);
    next(p);
    return name;
}

/* ".u32" -> T_U32; T_NONE if it is not a type. */
Type parse_type(const char *dotted) {
    static const struct { const char *name; Type type; } types[] = {
        {".pred", T_PRED}, {".b8", T_B8}, {".u8", T_U8}, {".s8", T_S8}, {".b16", T_B16},
        {".u16", T_U16}, {".s16", T_S16}, {".f16", T_F16}, {".bf16", T_BF16}, {".b32", T_B32},
        {".u32", T_U32}, {".s32", T_S32}, {".f32", T_F32}, {".f16x2", T_F16X2},
        {".bf16x2", T_BF16X2}, {".b64", T_B64}, {".u64", T_U64}, {".s64", T_S64}, {".f64", T_F64},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (!strcmp(dotted, types[i].name)) return types[i].type;
    return T_NONE;
}

/* ------------------------------------------------------------------------------------------------
 * symbols and slots */

static Symbol *add_symbol(Parser *p, const char *name, SymKind kind) {
    p->syms = xgrow(p->syms, p->n_syms, &p->cap_syms, sizeof *p->syms);
    Symbol *s = &p->syms[p->n_syms++];
    memset(s, 0, sizeof *s);
    s->name = name;
    s->kind = kind;
    s->count = -1;
    s->line = p->line;
    return s;
}

/* Does `name` belong to the register family s? Then gives its slot. */
static bool in_family(const Symbol *s, const char *name, u32 *slot) {
    size_t n = strlen(s->name);
    if (strncmp(name, s->name, n) || !isdigit((unsigned char)name[n])) return false;
    char *stop;
    long k = strtol(name + n, &stop, 10);
    if (*stop || k < 0 || k >= s->count || (name[n] == '0' && name[n + 1])) return false;
    *slot = s->slot + (u32)k * s->stride;
    return true;
}

/* The innermost symbol of that name, and the slot if it is a register. */
Symbol *find_symbol(Parser *p, const char *name, u32 *slot) {
    for (u32 i = p->n_syms; i-- > 0;) {
        if (i == p->func_base - 1 && i >= p->n_module)
            i = p->n_module - 1; /* a callee does not see its caller's names */
        if (i == ~0u) break;
        Symbol *s = &p->syms[i];
        *slot = s->slot;
        if (s->count >= 0 ? in_family(s, name, slot) : !strcmp(s->name, name)) return s;
    }
    return NULL;
}

/* Room in the frame for a register, constant or special register. */
u32 new_slot(Parser *p, int bits) {
    u32 at = p->code->frame_bytes;
    p->code->frame_bytes += bits == 1 ? 32 : bits == 64 ? 256 : 128;
    if (p->code->frame_bytes > 64u << 20) ptx_fail(p, "too many registers");
    return at;
}

/* The slot of a constant; each value has one per kernel. */
u32 const_slot(Parser *p, u64 value, int bits, bool dynamic) {
    SimCode *c = p->code;
    if (bits < 64 && bits > 1) value = (u32)value;
    for (u32 i = 0; i < c->n_consts; i++)
        if (c->consts[i].value == value && c->consts[i].bits == bits &&
            c->consts[i].dynamic == dynamic)
            return c->consts[i].offset;
    c->consts = xgrow(c->consts, c->n_consts, &c->cap_consts, sizeof *c->consts);
    u32 at = new_slot(p, bits);
    c->consts[c->n_consts++] = (Const){value, at, (u8)bits, dynamic};
    return at;
}

/* Gives bytes their aligned place after those in use. */
static u32 place(Parser *p, u32 *used, u64 bytes, u64 align, u64 limit, const char *what) {
    u64 at = (*used + align - 1) & ~(align - 1);
    if (at + bytes > limit)
        ptx_fail(p, "%s memory over %llu bytes", what, (unsigned long long)limit);
    *used = (u32)(at + bytes);
    return (u32)at;
}

u64 symbol_address(Parser *p, Symbol *s) {
    if (s->kind == K_SHARED && !s->dynamic && s->owner != p->code) {
        s->owner = p->code;
        s->value = place(p, &p->code->static_shared, s->bytes, s->align, 1 << 20, "shared");
    }
    return s->value;
}

/* One more instruction, with its line in the PTX and in the source. */
Inst *new_inst(Parser *p) {
    SimCode *c = p->code;
    c->inst = xgrow(c->inst, c->n_inst, &c->cap_inst, sizeof *c->inst);
    Inst *i = &c->inst[c->n_inst++];
    memset(i, 0, sizeof *i);
    i->line = p->line;
    i->src_file = p->loc_file;
    i->src_line = p->loc_line;
    return i;
}

/* The target of instruction `inst` is a label that may come later. */
void add_fixup(Parser *p, u32 inst, const char *label) {
    p->fixups = xgrow(p->fixups, p->n_fixups, &p->cap_fixups, sizeof *p->fixups);
    p->fixups[p->n_fixups++] = (Fixup){inst, label, p->line};
}

/* ------------------------------------------------------------------------------------------------
 * variables */

typedef struct {
    SymKind kind;
    bool external;
    u64 align;
    Type type;
    int vec;
    const char *name;
    u64 bytes;
} Variable;

/* ".align 4 .v4 .b8 name[64]"; the state space has been read. */
static Variable parse_variable(Parser *p, SymKind kind) {
    Variable v = {.kind = kind, .vec = 1};
    while (p->tok == TOK_WORD && p->word[0] == '.') {
        Type t = parse_type(p->word);
        if (t != T_NONE) {
            v.type = t;
        } else if (!strcmp(p->word, ".align")) {
            next(p);
            v.align = expect_number(p);
            continue;
        } else if (!strcmp(p->word, ".v2") || !strcmp(p->word, ".v4")) {
            v.vec = p->word[2] - '0';
        } else if (!strcmp(p->word, ".ptr") || !strcmp(p->word, ".global")) {
            ; /* a hint about a pointer parameter */
        } else {
            ptx_fail(p, "unsupported directive '%s' in a variable", p->word);
        }
        next(p);
    }
    if (type_bytes(v.type) == 0) ptx_fail(p, "variable without a type");
    v.name = expect_name(p);
    v.bytes = (u64)type_bytes(v.type) * (u64)v.vec;
    if (!v.align) v.align = v.bytes;
    if (v.align & (v.align - 1) || v.align > 4096 || !v.align)
        ptx_fail(p, "bad alignment of '%s'", v.name);
    while (accept(p, '[')) {
        u64 n = p->tok == TOK_NUMBER ? expect_number(p) : 0;
        if (n > (1ull << 40) / v.bytes) ptx_fail(p, "array '%s' is too large", v.name);
        v.bytes *= n;
        expect(p, ']');
    }
    return v;
}

/* One initial value: a number, a bit pattern, or the address of another variable. */
static void put_value(Parser *p, const Variable *v, u8 *to) {
    bool minus = accept(p, '-');
    u64 x = 0;
    if (p->tok == TOK_NUMBER) {
        x = p->number;
        if (v->type == T_F32 && p->is_float && p->float_bits == 64) {
            double d;
            memcpy(&d, &x, 8);
            float f = (float)d;
            x = 0;
            memcpy(&x, &f, 4);
        }
        next(p);
    } else {
        bool generic = accept_word(p, "generic") && accept(p, '(');
        u32 at;
        Symbol *s = p->tok == TOK_WORD ? find_symbol(p, p->word, &at) : NULL;
        if (!s || (s->kind != K_GLOBAL && s->kind != K_CONST))
            ptx_fail(p, "unsupported initialiser '%s'", p->word);
        x = s->value;
        next(p);
        if (accept(p, '+')) x += expect_number(p);
        if (generic) expect(p, ')');
    }
    x = minus ? 0 - x : x;
    memcpy(to, &x, type_bytes(v->type) < 8 ? (size_t)type_bytes(v->type) : 8);
}

/* "= {1, 2, {3, 4}}", or a single value; `at` counts the bytes. */
static void parse_initialiser(Parser *p, const Variable *v, u8 *host, u64 *at) {
    if (accept(p, '{')) {
        while (!accept(p, '}')) {
            parse_initialiser(p, v, host, at);
            accept(p, ',');
        }
        return;
    }
    u8 value[8] = {0};
    put_value(p, v, value);
    u64 n = (u64)type_bytes(v->type);
    if (*at + n > v->bytes) ptx_fail(p, "too many initial values for '%s'", v->name);
    memcpy(host + *at, value, n);
    *at += n;
}

/* A .global or .const variable gets device memory of its own, zero unless initialised. */
static void add_global(Parser *p, const Variable *v) {
    SimModule *m = p->m;
    Alloc *a;
    if (v->external || !v->bytes) ptx_fail(p, "unsupported: external variable '%s'", v->name);
    if (mem_alloc(m->device, v->bytes, true, &a) != SIM_SUCCESS) {
        p->error = SIM_ERROR_OUT_OF_MEMORY;
        ptx_fail(p, "no device memory for '%s'", v->name);
    }
    memset(a->host, 0, v->bytes);
    bits_set(a->valid, 0, v->bytes, true);
    a->read_only = v->kind == K_CONST;
    m->const_bytes += v->kind == K_CONST ? (u32)v->bytes : 0;
    struct Global *g = realloc(m->globals, ((size_t)m->n_globals + 1) * sizeof *g);
    if (!g) abort();
    m->globals = g;
    g[m->n_globals++] = (struct Global){keep(p, v->name), a->base, v->bytes};
    Symbol *s = add_symbol(p, v->name, v->kind);
    s->value = a->base;
    s->bytes = v->bytes;
    s->type = v->type;
    if (accept(p, '=')) {
        u64 at = 0;
        parse_initialiser(p, v, a->host, &at);
    }
}

/* A variable at module level or in a body, up to and including ';'. */
static void declare_variable(Parser *p, SymKind kind, bool external) {
    Variable v = parse_variable(p, kind);
    v.external = external;
    if (kind == K_GLOBAL || kind == K_CONST) {
        if (p->code) ptx_fail(p, "unsupported: global variable '%s' inside a function", v.name);
        add_global(p, &v);
    } else {
        Symbol *s = add_symbol(p, v.name, kind);
        s->type = v.type;
        s->bytes = v.bytes;
        s->align = v.align;
        s->dynamic = kind == K_SHARED && external;
        if (kind == K_LOCAL)
            s->value = place(p, &p->code->local_bytes, v.bytes, v.align, 512 << 10, "local");
    }
    expect(p, ';');
}

/* ".reg .b32 %r<10>, %x;" */
static void declare_registers(Parser *p) {
    Type type = p->tok == TOK_WORD ? parse_type(p->word) : T_NONE;
    if (type == T_NONE) ptx_fail(p, "unsupported register type '%s'", p->word);
    int bits = type == T_PRED ? 1 : type_bytes(type) == 8 ? 64 : 32;
    do {
        next(p);
        const char *name = expect_name(p);
        u32 count = 1;
        bool family = accept(p, '<');
        if (family) {
            count = (u32)expect_number(p);
            expect(p, '>');
            if (count > 1u << 18) ptx_fail(p, "too many registers");
        }
        Symbol *s = add_symbol(p, name, K_REG);
        s->type = type;
        s->count = family ? (int)count : -1;
        s->stride = bits == 1 ? 32 : bits == 64 ? 256 : 128;
        s->slot = p->code->frame_bytes;
        for (u32 k = 0; k < count; k++) new_slot(p, bits);
    } while (p->tok == TOK_PUNCT && p->punct == ',');
    expect(p, ';');
}

/* ------------------------------------------------------------------------------------------------
 * bodies */

static void skip_statement(Parser *p) {
    while (p->tok != TOK_END && !(p->tok == TOK_PUNCT && p->punct == ';')) next(p);
    next(p);
}

/* ".loc file line column [, function_name ..., inlined_at ...]" ends with its line. */
static void parse_loc(Parser *p) {
    int line = p->line;
    next(p);
    p->loc_file = (int)expect_number(p);
    p->loc_line = (int)expect_number(p);
    while (p->tok != TOK_END && p->line == line) next(p);
}

/* Takes the labels of a closing scope out of the fixups; the rest belongs to the scope around. */
static void resolve_labels(Parser *p, u32 first_symbol, u32 first_fixup) {
    u32 kept = first_fixup;
    for (u32 f = first_fixup; f < p->n_fixups; f++) {
        Fixup *x = &p->fixups[f];
        Symbol *s = NULL;
        for (u32 i = first_symbol; i < p->n_syms && !s; i++)
            if (p->syms[i].kind == K_LABEL && !strcmp(p->syms[i].name, x->label))
                s = &p->syms[i];
        if (s)
            p->code->inst[x->inst].target = (u32)s->value;
        else
            p->fixups[kept++] = *x;
    }
    p->n_fixups = kept;
}

static void parse_scope(Parser *p);

/* A word with a leading dot inside a body. */
static void parse_directive(Parser *p) {
    if (!strcmp(p->word, ".loc")) {
        parse_loc(p);
    } else if (accept_word(p, ".reg")) {
        declare_registers(p);
    } else if (accept_word(p, ".shared")) {
        declare_variable(p, K_SHARED, false);
    } else if (accept_word(p, ".local")) {
        declare_variable(p, K_LOCAL, false);
    } else if (accept_word(p, ".param")) {
        declare_variable(p, K_LOCAL, false); /* of a call: per-thread bytes */
    } else if (!strcmp(p->word, ".pragma")) {
        skip_statement(p);
    } else {
        ptx_fail(p, "unsupported directive '%s' in a function", p->word);
    }
}

/* "@%p add.u32 ...;" or without the guard. */
static void parse_guarded(Parser *p) {
    u32 guard = 0, at;
    bool flip = false;
    if (accept(p, '@')) {
        flip = accept(p, '!');
        Symbol *s = p->tok == TOK_WORD ? find_symbol(p, p->word, &at) : NULL;
        if (!s || s->kind != K_REG || s->type != T_PRED)
            ptx_fail(p, "'%s' is not a predicate", p->word);
        guard = at;
        next(p);
    }
    if (p->tok != TOK_WORD) ptx_fail(p, "expected an instruction before '%s'", p->word);
    decode_instruction(p, guard, flip);
}

/* A word followed by a single colon. */
static bool at_label(const Parser *p) {
    const char *c = p->p;
    while (c < p->end && (*c == ' ' || *c == '\t')) c++;
    return p->tok == TOK_WORD && c < p->end && *c == ':' && c[1] != ':';
}

static void parse_statement(Parser *p) {
    if (p->tok == TOK_PUNCT && p->punct == '{') {
        parse_scope(p);
    } else if (accept(p, ';')) {
        ;
    } else if (at_label(p)) {
        Symbol *s = add_symbol(p, keep(p, p->word), K_LABEL);
        s->value = p->code->n_inst;
        next(p);
        expect(p, ':');
    } else if (p->tok == TOK_WORD && p->word[0] == '.') {
        parse_directive(p);
    } else if (p->tok == TOK_END) {
        ptx_fail(p, "text ends inside a function");
    } else {
        parse_guarded(p);
    }
}

/* "{ ... }": names and labels declared inside end with it. */
static void parse_scope(Parser *p) {
    u32 syms = p->n_syms, fixups = p->n_fixups;
    expect(p, '{');
    while (!(p->tok == TOK_PUNCT && p->punct == '}')) parse_statement(p);
    resolve_labels(p, syms, fixups);
    p->n_syms = syms;
    next(p);
}

/* ------------------------------------------------------------------------------------------------
 * functions and calls */

/* Reads "(.param .b32 a, ...)" of a callee and binds its names to the caller's bytes. */
static void bind_params(Parser *p, Symbol *const *actual, int n_actual) {
    if (!accept(p, '('))
        return;
    for (int k = 0; !accept(p, ')'); k++) {
        if (!accept_word(p, ".param")) ptx_fail(p, "unsupported: register parameters of functions");
        Variable v = parse_variable(p, K_LOCAL);
        if (k >= n_actual || v.bytes > actual[k]->bytes)
            ptx_fail(p, "call does not match the parameters of the function");
        u64 value = actual[k]->value;
        Symbol *s = add_symbol(p, v.name, K_LOCAL);
        s->value = value;
        s->bytes = v.bytes;
        s->type = v.type;
        accept(p, ',');
    }
}

/* "(param0, param1)": bytes of the caller that were filled by st.param. */
static int call_arguments(Parser *p, Symbol *out, int max) {
    int n = 0;
    expect(p, '(');
    while (!accept(p, ')')) {
        u32 at;
        Symbol *s = p->tok == TOK_WORD ? find_symbol(p, p->word, &at) : NULL;
        if (!s || s->kind != K_LOCAL || n == max)
            ptx_fail(p, "unsupported call argument '%s'", p->word);
        out[n++] = *s;
        next(p);
        accept(p, ',');
    }
    return n;
}

/* Reads the callee's text in place of the call. */
static void inline_call(Parser *p, const Symbol *f, Symbol *ret, int n_ret, Symbol *arg, int n_arg)
{
    Parser saved = *p;
    Symbol *rets[8], *args[64];
    char label[32];
    if (++p->depth > 16) ptx_fail(p, "unsupported: recursion in '%s'", f->name);
    for (int k = 0; k < n_ret; k++) rets[k] = &ret[k];
    for (int k = 0; k < n_arg; k++) args[k] = &arg[k];
    p->p = f->text;
    p->read_line = f->line;
    p->func_base = p->n_syms;
    p->return_label = keep(p, (snprintf(label, sizeof label, "%%return%d", p->n_inlined++), label));
    next(p);
    if (p->tok == TOK_PUNCT && p->punct == '(')
        bind_params(p, rets, n_ret);
    next(p); /* the name */
    bind_params(p, args, n_arg);
    while (p->tok == TOK_WORD) /* .noreturn and the like */
        next(p);
    u32 fixups = p->n_fixups;
    parse_scope(p);
    Symbol *end = add_symbol(p, p->return_label, K_LABEL);
    end->value = p->code->n_inst;
    resolve_labels(p, p->n_syms - 1, fixups);
    p->n_syms = saved.n_syms;
    p->p = saved.p;
    p->read_line = saved.read_line;
    p->line = saved.line;
    p->tok = saved.tok;
    p->punct = saved.punct;
    memcpy(p->word, saved.word, sizeof p->word);
    p->func_base = saved.func_base;
    p->return_label = saved.return_label;
    p->loc_file = saved.loc_file;
    p->loc_line = saved.loc_line;
    p->depth--;
}

/* "call (ret), name, (arguments);" A guarded call is jumped over by the other lanes. */
void parse_call(Parser *p, u32 guard, bool flip) {
    Symbol ret[8], arg[64];
    u32 at;
    int n_ret = 0, n_arg = 0;
    if (p->tok == TOK_PUNCT) {
        n_ret = call_arguments(p, ret, 8);
        expect(p, ',');
    }
    Symbol *found = p->tok == TOK_WORD ? find_symbol(p, p->word, &at) : NULL;
    if (!found || found->kind != K_FUNC) ptx_fail(p, "unsupported: call of '%s'", p->word);
    Symbol f = *found;
    next(p);
    if (accept(p, ',')) n_arg = call_arguments(p, arg, 64);
    expect(p, ';');
    if (!f.text && !strcmp(f.name, "__assertfail")) {
        Inst *i = new_inst(p);
        i->run = run_assert;
        i->guard = guard;
        i->guard_flip = flip ? ~0u : 0;
        i->class = SIM_C_CONTROL;
        return;
    }
    if (!f.text) ptx_fail(p, "unsupported: call of external function '%s'", f.name);
    u32 skip = p->code->n_inst;
    if (guard) {
        Inst *i = new_inst(p);
        i->run = run_bra;
        i->guard = guard;
        i->guard_flip = flip ? 0 : ~0u;
        i->class = SIM_C_CONTROL;
    }
    inline_call(p, &f, ret, n_ret, arg, n_arg);
    if (guard) p->code->inst[skip].target = p->code->n_inst;
}

/* From "{" to behind the matching "}". */
static void skip_braces(Parser *p) {
    int depth = 0;
    do {
        if (p->tok == TOK_END) ptx_fail(p, "text ends inside a function");
        if (p->tok == TOK_PUNCT)
            depth += p->punct == '{' ? 1 : p->punct == '}' ? -1 : 0;
        next(p);
    } while (depth > 0);
}

/* ".func (ret) name (params) { ... }": noted, read when called. */
static void parse_func(Parser *p, const char *text, int line) {
    if (accept(p, '('))
        while (!accept(p, ')'))
            next(p);
    const char *name = expect_name(p);
    u32 at;
    Symbol *s = find_symbol(p, name, &at);
    if (!s || s->kind != K_FUNC) s = add_symbol(p, name, K_FUNC);
    while (!(p->tok == TOK_PUNCT && (p->punct == '{' || p->punct == ';')) && p->tok != TOK_END)
        next(p);
    if (accept(p, ';')) return;
    s->text = text;
    s->line = line;
    skip_braces(p);
}

/* Kernel parameters lie one after the other, aligned, in the launch's parameter block. */
static void entry_params(Parser *p) {
    SimKernel *k = p->kernel;
    SimParam params[512];
    if (!accept(p, '('))
        return;
    while (!accept(p, ')')) {
        if (!accept_word(p, ".param")) ptx_fail(p, "expected .param");
        Variable v = parse_variable(p, K_PARAM);
        u32 at = place(p, &k->param_bytes, v.bytes, v.align, 4352, "parameter");
        if (k->n_params == 512) ptx_fail(p, "too many parameters");
        params[k->n_params++] = (SimParam){at, (u32)v.bytes, (u32)v.align};
        Symbol *s = add_symbol(p, v.name, K_PARAM);
        s->value = at;
        s->bytes = v.bytes;
        s->type = v.type;
        accept(p, ',');
    }
    size_t bytes = (size_t)k->n_params * sizeof *params;
    k->params = memcpy(arena_get(p->m, bytes + 1), params, bytes);
}

/* .maxntid, .reqntid and the like, between the parameters and the body. */
static void entry_limits(Parser *p) {
    SimKernel *k = p->kernel;
    k->max_threads = 1024;
    while (p->tok == TOK_WORD && p->word[0] == '.') {
        bool required = !strcmp(p->word, ".reqntid");
        bool known = required || !strcmp(p->word, ".maxntid") || !strcmp(p->word, ".maxnreg") ||
                     !strcmp(p->word, ".minnctapersm");
        bool threads = required || !strcmp(p->word, ".maxntid");
        if (!known) ptx_fail(p, "unsupported directive '%s'", p->word);
        next(p);
        unsigned n[3] = {1, 1, 1};
        int k_dim = 0;
        do
            n[k_dim++] = (unsigned)expect_number(p);
        while (k_dim < 3 && accept(p, ','));
        if (threads) k->max_threads = (int)(n[0] * n[1] * n[2]);
        if (required) memcpy(k->required_block, n, sizeof n);
    }
}

/* ".entry name (params) { body }" -> a kernel with its code. */
static void parse_entry(Parser *p) {
    SimModule *m = p->m;
    SimKernel *k = arena_get(m, sizeof *k);
    SimCode *c = xalloc(sizeof *c);
    SimKernel **list = realloc(m->kernels, ((size_t)m->n_kernels + 1) * sizeof *list);
    if (!list) abort();
    m->kernels = list;
    list[m->n_kernels++] = k;
    k->module = m;
    k->code = c;
    k->name = expect_name(p);
    c->frame_bytes = 256; /* offset 0 is the sink of '_' */
    p->kernel = k;
    p->code = c;
    p->n_module = p->func_base = p->n_syms;
    p->return_label = NULL;
    p->loc_file = p->loc_line = 0;
    entry_params(p);
    entry_limits(p);
    parse_scope(p);
    if (p->n_fixups) {
        p->line = p->fixups[0].line;
        ptx_fail(p, "label '%s' not found", p->fixups[0].label);
    }
    Inst *end = new_inst(p);
    end->run = run_exit;
    end->class = SIM_C_CONTROL;
    p->n_syms = p->n_module;
    k->shared_bytes = c->static_shared;
    k->local_bytes = c->local_bytes;
    analyse(m, k);
    p->code = NULL;
}

/* ------------------------------------------------------------------------------------------------
 * modules */

/* ".version 7.4" */
static void parse_version(Parser *p) {
    if (p->tok != TOK_NUMBER) ptx_fail(p, "bad .version");
    double d = 0;
    memcpy(&d, &p->number, 8);
    p->m->version = (int)(d * 10 + 0.5);
    next(p);
    int limit = sim_options.ptx_version_max;
    if (limit && p->m->version > limit) {
        p->error = SIM_ERROR_UNSUPPORTED_PTX_VERSION;
        ptx_fail(p, "PTX version %d.%d is newer than the %d.%d of this driver",
                 p->m->version / 10, p->m->version % 10, limit / 10, limit % 10);
    }
}

/* ".target sm_80, debug"; sm_90a and the like are for one architecture only. */
static void parse_target(Parser *p) {
    if (p->tok != TOK_WORD || sscanf(p->word, "sm_%d", &p->m->target) != 1)
        ptx_fail(p, "bad .target '%s'", p->word);
    if (strspn(p->word + 3, "0123456789") != strlen(p->word + 3))
        ptx_fail(p, "target '%s' is for another architecture", p->word);
    if (p->m->target > sim_options.sm)
        ptx_fail(p, "target sm_%d is newer than the device's sm_%d", p->m->target, sim_options.sm);
    for (next(p); accept(p, ',');) next(p);
}

/* ".file 1 "name", ...": number 1 in .loc means this file. */
static void parse_file(Parser *p) {
    SimModule *m = p->m;
    int n = (int)expect_number(p);
    if (n < 0 || n > 10000 || p->tok != TOK_STRING) ptx_fail(p, "bad .file");
    while (m->n_files <= n) {
        m->files = realloc(m->files, ((size_t)m->n_files + 1) * sizeof *m->files);
        if (!m->files) abort();
        m->files[m->n_files++] = "";
    }
    m->files[n] = keep(p, p->word);
    for (next(p); accept(p, ',');) next(p);
}

/* Notes all functions, so that they can be called before their text. */
static void find_functions(Parser *p) {
    Parser start = *p;
    while (p->tok != TOK_END) {
        const char *text = p->p;
        int line = p->read_line;
        if (accept_word(p, ".func"))
            parse_func(p, text, line);
        else
            next(p);
    }
    p->p = start.p;
    p->line = start.line;
    p->read_line = start.read_line;
    p->tok = start.tok;
    memcpy(p->word, start.word, sizeof p->word);
}

/* One directive at module level. */
static void parse_top(Parser *p) {
    bool external = false;
    while (accept_word(p, ".visible") || accept_word(p, ".weak") || accept_word(p, ".common") ||
           (p->tok == TOK_WORD && !strcmp(p->word, ".extern"))) {
        if (accept_word(p, ".extern")) external = true;
    }
    const char *text = p->p;
    int line = p->read_line;
    if (accept_word(p, ".version"))
        parse_version(p);
    else if (accept_word(p, ".target"))
        parse_target(p);
    else if (accept_word(p, ".address_size") && p->tok == TOK_NUMBER && p->number == 64)
        next(p);
    else if (accept_word(p, ".entry"))
        parse_entry(p);
    else if (accept_word(p, ".func"))
        parse_func(p, text, line);
    else if (accept_word(p, ".global"))
        declare_variable(p, K_GLOBAL, external);
    else if (accept_word(p, ".const"))
        declare_variable(p, K_CONST, external);
    else if (accept_word(p, ".shared"))
        declare_variable(p, K_SHARED, external);
    else if (accept_word(p, ".file"))
        parse_file(p);
    else if (p->tok == TOK_WORD && !strcmp(p->word, ".pragma"))
        skip_statement(p);
    else if (accept_word(p, ".section")) {
        next(p);
        skip_braces(p);
    } else
        ptx_fail(p, "unsupported directive or text '%s'",
                 p->tok == TOK_NUMBER ? "number" : p->word);
}

int sim_module_load(int device, const char *ptx, size_t size, SimModule **module, char *log,
                    size_t log_size) {
    Parser *p = xalloc(sizeof *p);
    SimModule *m = xalloc(sizeof *m);
    m->device = device;
    *p = (Parser){.m = m, .p = ptx, .end = ptx + strnlen(ptx, size), .line = 1, .read_line = 1,
                  .log = log, .log_size = log_size};
    if (log_size) log[0] = 0;
    *module = NULL;
    if (!setjmp(p->fail)) {
        next(p);
        if (p->tok != TOK_WORD || strcmp(p->word, ".version"))
            ptx_fail(p, "PTX must begin with .version");
        find_functions(p);
        while (p->tok != TOK_END) parse_top(p);
        *module = m;
    }
    int error = p->error;
    free(p->syms);
    free(p->fixups);
    free(p);
    if (error) sim_module_unload(m);
    return error;
}

void sim_module_unload(SimModule *m) {
    for (int k = 0; k < m->n_kernels; k++) {
        SimCode *c = m->kernels[k]->code;
        free(c->inst);
        free(c->consts);
        free(c);
    }
    for (int g = 0; g < m->n_globals; g++) {
        Alloc *a = mem_lookup(m->globals[g].address);
        if (a && !a->freed) {
            a->module_global = false;
            sim_mem_free(a->base);
        }
    }
    free(m->kernels);
    free(m->globals);
    free(m->files);
    while (m->arena) {
        struct Chunk *c = m->arena;
        m->arena = c->next;
        free(c);
    }
    free(m);
}

int sim_module_device(const SimModule *m) { return m->device; }
int sim_module_ptx_version(const SimModule *m) { return m->version; }
int sim_module_target(const SimModule *m) { return m->target; }
int sim_module_n_kernels(const SimModule *m) { return m->n_kernels; }
SimKernel *sim_module_kernel(const SimModule *m, int index) {
    return index >= 0 && index < m->n_kernels ? m->kernels[index] : NULL;
}

SimKernel *sim_module_find(const SimModule *m, const char *name) {
    for (int k = 0; k < m->n_kernels; k++)
        if (!strcmp(m->kernels[k]->name, name)) return m->kernels[k];
    return NULL;
}

int sim_module_global(const SimModule *m, const char *name, u64 *address, u64 *bytes) {
    for (int g = 0; g < m->n_globals; g++)
        if (!strcmp(m->globals[g].name, name)) {
            *address = m->globals[g].address;
            *bytes = m->globals[g].bytes;
            return SIM_SUCCESS;
        }
    return SIM_ERROR_NOT_FOUND;
}
