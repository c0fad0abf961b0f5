/* ptx_parse.c: PTX text -> module: tokens, variables, scopes; one line of PTX -> one Inst, by the
 * tables of forms. Functions other than kernels are skipped: a call is an error that names them.
 *
 * The tables (alu_forms, ...) are the complete list of what is understood: an opcode, a modifier or
 * an operand that no row allows is refused by name. Letters of a form's operand list, where "type"
 * and "type2", "type3" are the types in the order they stand in the opcode:
 *   d destination of type             D of any width from type's up; a {list} with .v2 / .v4
 *   e destination of twice the width  u destination of 32 bits      p predicate destination, p|q
 *   V {list} of 32-bit destinations
 *   a source of type   A of type's width or more, or a {list}   t source of type2   E of twice type
 *   w source of 32 bits   l of 64 bits   q predicate, may be !p
 *   U {list} of 32-bit sources, or one register   m [address]   i integer constant   L label
 *   X Y of mov   M second [address]   n integer up to 255
 *   ? the operands after it may be absent
 * A destination may be followed by |p, a predicate (shfl, match). */
#include "ptx.h"

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>

typedef enum { K_REG, K_LABEL, K_SHARED, K_LOCAL, K_GLOBAL, K_CONST, K_PARAM } SymKind;

/* A name. Registers: `slot` is a frame offset, count >= 0 makes it a family name0 .. name(count-1).
 * Memory: `value` is the address in its window. */
typedef struct {
    const char *name;
    SymKind kind;
    Type type;
    u32 slot, stride;
    int count;
    u64 value, bytes, align;
    bool dynamic;          /* extern shared: starts after the static part */
    const SimCode *owner;  /* kernel for which a module-level shared variable has its address */
} Symbol;

typedef enum { TOK_END, TOK_WORD, TOK_NUMBER, TOK_STRING, TOK_PUNCT } Token;

typedef struct {
    u32 inst;
    const char *label;
    int line;
} Fixup;

typedef struct {
    SimModule *m;
    const char *p, *end;   /* unread text */
    int line;              /* of the token */
    int read_line;         /* of p */
    Token tok;
    char word[512];        /* TOK_WORD and TOK_STRING text */
    int punct;
    u64 number;            /* bits */
    int float_bits;        /* 32: pattern 0f; 64: pattern 0d, or a decimal fraction; 0: integer */
    Symbol *syms;
    u32 n_syms, cap_syms;
    Fixup *fixups;
    u32 n_fixups, cap_fixups;
    SimKernel *kernel;
    SimCode *code;
    int loc_file, loc_line;
    jmp_buf fail;
    char *log;
    size_t log_size;
    int error;
} Parser;

void *module_memory(SimModule *m, size_t bytes) {
    m->memory = xgrow(m->memory, m->n_memory, &m->cap_memory, sizeof *m->memory);
    return m->memory[m->n_memory++] = zalloc(bytes);
}

static char *keep(Parser *p, const char *text) {
    size_t n = strlen(text) + 1;
    return memcpy(module_memory(p->m, n), text, n);
}

/* ---- tokens */

/* Ends the parse: the line and the reason go to the log. */
__attribute__((format(printf, 2, 3), noreturn))
static void ptx_fail(Parser *p, const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    int n = p->log_size ? snprintf(p->log, p->log_size, "line %d: ", p->line) : 0;
    if (n >= 0 && (size_t)n < p->log_size)
        vsnprintf(p->log + n, p->log_size - (size_t)n, format, ap);
    va_end(ap);
    if (!p->error) p->error = E_INVALID_PTX;
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
    const char *s = p->p;
    char *stop, digits[17] = {0};
    p->tok = TOK_NUMBER;
    p->float_bits = 0;
    if (s[0] == '0' && s[1] && strchr("fFdD", s[1])) {
        p->float_bits = strchr("fF", s[1]) ? 32 : 64;
        snprintf(digits, (size_t)p->float_bits / 4 + 1, "%.16s", s + 2);
        p->number = strtoull(digits, &stop, 16);
        if (stop - digits != p->float_bits / 4 || !isxdigit((unsigned char)digits[0]))
            ptx_fail(p, "floating-point constant needs %d hexadecimal digits", p->float_bits / 4);
        p->p += 2 + p->float_bits / 4;
        return;
    }
    bool binary = s[0] == '0' && (s[1] == 'b' || s[1] == 'B');
    p->number = binary ? strtoull(s + 2, &stop, 2) : strtoull(s, &stop, 0);
    if (*stop == '.' || *stop == 'e' || *stop == 'E') {
        p->number = double_bits(strtod(s, &stop));
        p->float_bits = 64;
    }
    p->p = stop + (*stop == 'U');
}

/* A double's pattern -> the pattern of the f32 next to it. */
static u64 to_f32(u64 pattern) {
    return float_bits((float)bits_double(pattern));
}

/* Reads the next token into tok, word, punct, number. */
static void next(Parser *p) {
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

static bool at_punct(const Parser *p, int punct) {
    return p->tok == TOK_PUNCT && p->punct == punct;
}

static bool at_word(const Parser *p, const char *word) {
    return p->tok == TOK_WORD && !strcmp(p->word, word);
}

/* Takes the punctuation if it is the current token. */
static bool accept(Parser *p, int punct) {
    bool here = at_punct(p, punct);
    if (here) next(p);
    return here;
}

static void expect(Parser *p, int punct) {
    if (!accept(p, punct))
        ptx_fail(p, "expected '%c' before '%s'", punct, p->tok == TOK_NUMBER ? "number" : p->word);
}

static bool accept_word(Parser *p, const char *word) {
    bool here = at_word(p, word);
    if (here) next(p);
    return here;
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

/* Which word of a list separated by blanks: 1, 2 ...; 0: none. */
static int word_index(const char *list, const char *word) {
    size_t len = strlen(word);
    for (int n = 1; *list; n++) {
        size_t here = strcspn(list, " ");
        if (here == len && !memcmp(list, word, len)) return n;
        list += here + (list[here] == ' ');
    }
    return 0;
}

/* ".u32" -> T_U32; T_NONE if it is not a type. */
static Type parse_type(const char *dotted) {
    return word_index(".pred .b8 .u8 .s8 .b16 .u16 .s16 .f16 .bf16 .b32 .u32 .s32 .f32 .f16x2 "
                      ".bf16x2 .b64 .u64 .s64 .f64", dotted); /* as in Type */
}

/* ---- symbols and slots */

static Symbol *add_symbol(Parser *p, const char *name, SymKind kind, u64 value) {
    p->syms = xgrow(p->syms, p->n_syms, &p->cap_syms, sizeof *p->syms);
    Symbol *s = &p->syms[p->n_syms++];
    *s = (Symbol){.name = name, .kind = kind, .value = value, .count = -1};
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

/* The innermost symbol that the current token names, or NULL; its slot if it is a register. */
static Symbol *named(Parser *p, u32 *slot) {
    for (u32 i = p->n_syms; p->tok == TOK_WORD && i-- > 0;) {
        Symbol *s = &p->syms[i];
        *slot = s->slot;
        if (s->count >= 0 ? in_family(s, p->word, slot) : !strcmp(s->name, p->word)) return s;
    }
    return NULL;
}

/* Room in the frame for a register, constant or special register. */
static u32 new_slot(Parser *p, int bits) {
    u32 at = p->code->frame_bytes;
    p->code->frame_bytes += bits == 1 ? 32 : bits == 64 ? 256 : 128; /* a predicate: one mask */
    if (p->code->frame_bytes > 64u << 20) ptx_fail(p, "too many registers");
    return at;
}

/* The slot of a constant; each value has one per kernel. */
static u32 const_slot(Parser *p, u64 value, int bits, bool dynamic) {
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
    if (at + bytes > limit) ptx_fail(p, "%s memory over %lu bytes", what, limit);
    *used = (u32)(at + bytes);
    return (u32)at;
}

static u64 symbol_address(Parser *p, Symbol *s) {
    if (s->kind == K_SHARED && !s->dynamic && s->owner != p->code) {
        s->owner = p->code;
        s->value = place(p, &p->code->static_shared, s->bytes, s->align, 48 << 10, "shared");
    }
    return s->value;
}

/* One more instruction, with its line in the PTX and in the source. */
static Inst *new_inst(Parser *p) {
    SimCode *c = p->code;
    c->inst = xgrow(c->inst, c->n_inst, &c->cap_inst, sizeof *c->inst);
    Inst *i = &c->inst[c->n_inst++];
    *i = (Inst){.line = p->line, .src_file = p->loc_file, .src_line = p->loc_line};
    return i;
}

/* The target of instruction `inst` is a label that may come later. */
static void add_fixup(Parser *p, u32 inst, const char *label) {
    p->fixups = xgrow(p->fixups, p->n_fixups, &p->cap_fixups, sizeof *p->fixups);
    p->fixups[p->n_fixups++] = (Fixup){inst, label, p->line};
}

/* ---- variables */

typedef struct {
    const char *name;
    Type type;
    u64 align, bytes;
} Variable;

/* ".align 4 .v4 .b8 name[64]"; the state space has been read. */
static Variable parse_variable(Parser *p) {
    Variable v = {.type = T_NONE};
    u64 elements = 1;
    while (p->tok == TOK_WORD && p->word[0] == '.') {
        Type t = parse_type(p->word);
        if (accept_word(p, ".align")) {
            v.align = expect_number(p);
            continue;
        }
        if (t != T_NONE)
            v.type = t;
        else if (at_word(p, ".v2") || at_word(p, ".v4"))
            elements = (u64)(p->word[2] - '0');
        else if (!at_word(p, ".ptr") && !at_word(p, ".global")) /* hints about a pointer */
            ptx_fail(p, "unsupported directive '%s' in a variable", p->word);
        next(p);
    }
    if (type_bytes(v.type) == 0) ptx_fail(p, "variable without a type");
    v.name = expect_name(p);
    v.bytes = (u64)type_bytes(v.type) * elements;
    if (!v.align) v.align = v.bytes;
    if (v.align & (v.align - 1) || v.align > 4096) ptx_fail(p, "bad alignment of '%s'", v.name);
    while (accept(p, '[')) {
        u64 n = p->tok == TOK_NUMBER ? expect_number(p) : 0;
        if (n > (1ull << 40) / v.bytes) ptx_fail(p, "array '%s' is too large", v.name);
        v.bytes *= n;
        expect(p, ']');
    }
    return v;
}

static Symbol *add_variable(Parser *p, const Variable *v, SymKind kind, u64 address) {
    Symbol *s = add_symbol(p, v->name, kind, address);
    s->type = v->type;
    s->bytes = v->bytes;
    s->align = v->align;
    return s;
}

/* One initial value: a number, a bit pattern, or the address of another variable. */
static u64 initial_value(Parser *p, const Variable *v) {
    bool minus = accept(p, '-');
    u32 at;
    u64 x;
    if (p->tok == TOK_NUMBER) {
        x = v->type == T_F32 && p->float_bits == 64 ? to_f32(p->number) : p->number;
        next(p);
    } else {
        Symbol *s = named(p, &at);
        if (!s || (s->kind != K_GLOBAL && s->kind != K_CONST))
            ptx_fail(p, "unsupported initialiser '%s'", p->word);
        x = s->value;
        next(p);
        if (accept(p, '+')) x += expect_number(p);
    }
    return minus ? 0 - x : x;
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
    u64 value = initial_value(p, v), n = (u64)type_bytes(v->type);
    if (*at + n > v->bytes) ptx_fail(p, "too many initial values for '%s'", v->name);
    memcpy(host + *at, &value, n);
    *at += n;
}

/* A .global or .const variable gets device memory of its own, zero unless initialised. */
static void add_global(Parser *p, const Variable *v, SymKind kind, bool external) {
    SimModule *m = p->m;
    Alloc *a;
    if (p->code) ptx_fail(p, "unsupported: global variable '%s' inside a function", v->name);
    if (external || !v->bytes) ptx_fail(p, "unsupported: external variable '%s'", v->name);
    if (mem_alloc(m->device, v->bytes, true, &a) != OK) {
        p->error = E_OUT_OF_MEMORY;
        ptx_fail(p, "no device memory for '%s'", v->name);
    }
    memset(a->host, 0, v->bytes);
    bits_set(a->valid, 0, v->bytes, true);
    a->read_only = kind == K_CONST;
    m->const_bytes += kind == K_CONST ? (u32)v->bytes : 0;
    m->globals = xgrow(m->globals, m->n_globals, &m->cap_globals, sizeof *m->globals);
    m->globals[m->n_globals++] = a->base;
    add_variable(p, v, kind, a->base);
    u64 at = 0;
    if (accept(p, '=')) parse_initialiser(p, v, a->host, &at);
}

/* A variable at module level or in a body, up to and including ';'. */
static void declare_variable(Parser *p, SymKind kind, bool external) {
    Variable v = parse_variable(p);
    if (kind == K_GLOBAL || kind == K_CONST)
        add_global(p, &v, kind, external);
    else if (kind == K_SHARED)
        add_variable(p, &v, kind, 0)->dynamic = external;
    else
        add_variable(p, &v, kind, place(p, &p->code->local_bytes, v.bytes, v.align, 512 << 10,
                                        "local"));
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
        Symbol *s = add_symbol(p, name, K_REG, 0);
        s->type = type;
        s->count = family ? (int)count : -1;
        s->stride = bits == 1 ? 32 : bits == 64 ? 256 : 128;
        s->slot = p->code->frame_bytes;
        for (u32 k = 0; k < count; k++) new_slot(p, bits);
    } while (at_punct(p, ','));
    expect(p, ';');
}

/* ---- opcodes */

/* The modifiers that say 1, 2, 3 ... of a field of the instruction (in the order of its enum; "-":
 * no such modifier); the others change nothing here. */
#define FIELD(name) offsetof(Inst, name)
static const struct {
    size_t field;
    const char *names;
} modifiers[] = {
    {FIELD(space), ".global .shared .local .const .param"}, {FIELD(space), "- .shared::cta"},
    {FIELD(round), ".rn .rz .rm .rp .rna .rni .rzi .rmi .rpi"},
    {FIELD(cmp), ".lt .eq .le .gt .ne .ge .num .nan .ltu .equ .leu .gtu .neu .geu"},
    {FIELD(cmp), ".lo - .ls .hi - .hs"}, /* unsigned integers */
    {FIELD(op), ".and .or .xor .add .min .max .inc .dec .exch .cas .up .down .bfly .idx .all .any "
                ".uni .ballot"},
    {FIELD(vec), ".x1 .v2 - .v4"}, {FIELD(vec), "- .x2 - .x4"},
    {FIELD(ftz), ".ftz"}, {FIELD(sat), ".sat"}, {FIELD(sat), ".satfinite"}, {FIELD(nan), ".NaN"},
    {FIELD(strong), ".volatile"}, {FIELD(strong), ".relaxed"}, {FIELD(fence), ".acquire"},
    {FIELD(fence), ".release"}, {FIELD(fence), ".acq_rel"}, {FIELD(relu), ".relu"},
    {FIELD(to), ".to"}, {FIELD(trans), ".trans"}, {FIELD(left), ".l"}, {FIELD(wrap), ".wrap"},
    {FIELD(shiftamt), ".shiftamt"},
};

/* One ".modifier": a type, or in the table above; of two state spaces the first counts. */
static void apply_modifier(Inst *i, const char *name) {
    Type t = parse_type(name);
    if (t != T_NONE) {
        u8 *to = !i->type ? &i->type : !i->type2 ? &i->type2 : &i->type3;
        *to = *to ? *to : (u8)t; /* the fourth, of mma, repeats the first */
        return;
    }
    for (size_t k = 0; k < sizeof modifiers / sizeof *modifiers; k++) {
        u8 *field = (u8 *)i + modifiers[k].field;
        if (!*field) *field = (u8)word_index(modifiers[k].names, name);
    }
}

/* Does `element` ("x|y") allow the modifier at `mod` (".x", up to the next dot)? */
static bool element_allows(const char *element, size_t n, const char *mod, size_t m) {
    for (const char *e = element; e < element + n;) {
        size_t len = strcspn(e, "| ]");
        if (len == m && !memcmp(e, mod, m)) return true;
        e += len + 1;
    }
    return false;
}

/* Matches an opcode against a pattern; on failure `reach` is how much of the opcode was matched. */
static bool match_form(const char *pattern, const char *opcode, size_t *reach) {
    size_t n = strcspn(pattern, " "), name = strcspn(opcode, ".");
    const char *mod = opcode + name, *e = pattern + n;
    *reach = 0;
    if (!element_allows(pattern, n, opcode, name)) return false;
    while (*e == ' ') e++;
    while (*e) {
        bool optional = *e == '[';
        const char *start = e + optional;
        size_t len = strcspn(start, optional ? "]" : " ");
        size_t m = *mod ? 1 + strcspn(mod + 1, ".") : 0;
        if (m && element_allows(start, len, mod, m))
            mod += m;
        else if (!optional)
            break;
        e = start + len + optional;
        while (*e == ' ') e++;
    }
    *reach = (size_t)(mod - opcode);
    return !*e && !*mod;
}

static const Form *const form_tables[] = {alu_forms, cvt_forms, mem_forms, warp_forms};

/* The first form that allows the opcode, or an error that names what none does. */
static const Form *find_form(Parser *p, const char *opcode) {
    size_t best = 0, name = strcspn(opcode, ".");
    bool known = false;
    for (size_t t = 0; t < sizeof form_tables / sizeof *form_tables; t++)
        for (const Form *f = form_tables[t]; f->pattern; f++) {
            size_t reach;
            if (match_form(f->pattern, opcode, &reach)) return f;
            known |= reach > 0;
            best = reach > best ? reach : best;
        }
    if (!known) ptx_fail(p, "unknown instruction '%.*s' in '%s'", (int)name, opcode, opcode);
    size_t bad = strcspn(opcode + best + (opcode[best] == '.'), ".");
    if (!opcode[best]) ptx_fail(p, "unsupported form '%s': modifiers are missing", opcode);
    ptx_fail(p, "unsupported modifier '%.*s' in '%s'", (int)bad + 1, opcode + best, opcode);
}

/* ---- operands */

static const char special_names[] =
    "%tid.x %tid.y %tid.z %ntid.x %ntid.y %ntid.z %ctaid.x %ctaid.y %ctaid.z %nctaid.x %nctaid.y "
    "%nctaid.z %laneid %warpid %nwarpid %lanemask_eq %lanemask_lt %lanemask_le %lanemask_gt "
    "%lanemask_ge %dynamic_smem_size %total_smem_size %smid %nsmid %gridid";

/* %tid.x and its like live in slots that are filled before a warp starts; 0: no such register. */
static u32 special_slot(Parser *p, bool *wide) {
    int k = word_index(special_names, p->word) - 1;
    if (k < 0) return 0;
    *wide = k >= SR_GRIDID;
    if (!p->code->special[k]) p->code->special[k] = new_slot(p, *wide ? 64 : 32);
    return p->code->special[k];
}

static int width_bits(Type t) {
    return t == T_PRED ? 1 : type_bytes(t) * 8;
}

/* The bits of an immediate as an operand of `bits` bits and of type `type`. */
static u64 immediate(Parser *p, Type type, int bits, bool minus) {
    u64 v = p->number;
    if (p->float_bits && !type_is_float(type) && p->float_bits != bits)
        ptx_fail(p, "floating-point constant for an integer operand");
    if (!p->float_bits && (type == T_F32 || type == T_F64))
        ptx_fail(p, "integer constant for a floating-point operand");
    if (p->float_bits == 64 && bits == 32) v = to_f32(v);
    if (minus) v = p->float_bits ? v ^ 1ull << (bits - 1) : 0 - v;
    return bits == 64 ? v : v & ((1ull << bits) - 1);
}

/* Has the register that the token names `bits` bits, or (relaxed) at least as many? */
static void check_width(Parser *p, const Symbol *s, int bits, bool relaxed) {
    int have = width_bits(s->type);
    if (s->type == T_PRED || (relaxed ? have < bits : have != bits))
        ptx_fail(p, "operand '%s' has %d bits, the instruction needs %d", p->word, have, bits);
}

/* A single source. Returns its slot; *wide: a slot of 64 bits per lane. */
static u32 source(Parser *p, Type type, int bits, bool relaxed, bool *wide) {
    bool minus = accept(p, '-'), dynamic = false;
    u32 at, width = bits > 32 ? 64 : 32;
    u64 v = 32; /* WARP_SZ */
    Symbol *s = named(p, &at);
    *wide = width == 64;
    if (p->tok == TOK_NUMBER) {
        v = immediate(p, type, bits, minus);
    } else if (minus || p->tok != TOK_WORD) {
        ptx_fail(p, "bad operand '%s'", p->word);
    } else if (s && s->kind == K_REG) {
        check_width(p, s, bits, relaxed);
        *wide = width_bits(s->type) == 64;
        next(p);
        return at;
    } else if (s && s->kind != K_LABEL) {
        v = symbol_address(p, s);
        dynamic = s->dynamic;
    } else if (!s && (at = special_slot(p, wide)) != 0) {
        if (width == 64 && !*wide) ptx_fail(p, "operand '%s' is too narrow", p->word);
        next(p);
        return at;
    } else if (s || !at_word(p, "WARP_SZ")) {
        ptx_fail(p, "'%s' is not declared", p->word);
    }
    next(p);
    if (s && accept(p, '+')) v += expect_number(p);
    return const_slot(p, v, (int)width, dynamic);
}

static u32 predicate(Parser *p, bool destination) {
    u32 at = 0;
    if (destination && accept_word(p, "_")) return 0;
    Symbol *s = named(p, &at);
    if (!s || s->kind != K_REG || s->type != T_PRED)
        ptx_fail(p, "'%s' is not a predicate", p->word);
    next(p);
    return at;
}

/* A register to write, of `bits` bits or (relaxed) more. */
static u32 destination(Parser *p, int bits, bool relaxed, bool *wide) {
    u32 at = 0;
    if (accept_word(p, "_")) return 0;
    Symbol *s = named(p, &at);
    if (!s || s->kind != K_REG || s->type == T_PRED) ptx_fail(p, "'%s' is not a register", p->word);
    check_width(p, s, bits, relaxed);
    *wide = width_bits(s->type) == 64;
    next(p);
    return at;
}

static void add_src(Parser *p, Inst *i, u32 at) {
    if (i->n_src == MAX_SRC) ptx_fail(p, "too many operands");
    i->src[i->n_src++] = at;
}

static void add_dst(Parser *p, Inst *i, u32 at) {
    if (i->n_dst == MAX_DST) ptx_fail(p, "too many destinations");
    i->dst[i->n_dst++] = at;
}

/* [reg + offset], [symbol + offset], [offset]: adds the slot of the base as a source (64 bits, or
 * 32 for a 32-bit shared or local address, which `wide` tells) and returns the offset. */
static int64_t address_operand(Parser *p, Inst *i, bool *wide) {
    u32 at = 0;
    int64_t offset = 0;
    Symbol *s;
    expect(p, '[');
    s = named(p, &at);
    *wide = !s || s->kind != K_REG || width_bits(s->type) == 64;
    if (p->tok == TOK_NUMBER) {
        at = const_slot(p, p->number, 64, false);
    } else if (!s || s->kind == K_LABEL || s->type == T_PRED) {
        ptx_fail(p, "bad address '%s'", p->word);
    } else if (s->kind == K_REG) {
        if (width_bits(s->type) < 32) check_width(p, s, 64, false);
    } else {
        at = const_slot(p, symbol_address(p, s), 64, s->dynamic);
    }
    next(p);
    while (at_punct(p, '+') || at_punct(p, '-')) {
        bool minus = accept(p, '-') || (next(p), accept(p, '-'));
        if (p->tok != TOK_NUMBER) ptx_fail(p, "bad address offset '%s'", p->word);
        offset += minus ? -(int64_t)p->number : (int64_t)p->number;
        next(p);
    }
    expect(p, ']');
    add_src(p, i, at);
    return offset;
}

/* The global address of cp.async; its offset goes to `target`. */
static void second_address(Parser *p, Inst *i) {
    bool wide;
    int64_t offset = address_operand(p, i, &wide);
    if (!wide || offset < INT32_MIN || offset > INT32_MAX) ptx_fail(p, "bad global address");
    i->target = (u32)(int32_t)offset;
}

/* "{a, b, c, d}" or a single register. */
static void list_operand(Parser *p, Inst *i, bool dst, Type type, int bits, bool relaxed) {
    bool braces = accept(p, '{');
    do
        if (dst)
            add_dst(p, i, destination(p, bits, relaxed, &i->wide_dst));
        else
            add_src(p, i, source(p, type, bits, relaxed, &i->wide_src));
    while (braces && accept(p, ','));
    if (braces) expect(p, '}');
}

/* "p", "!p", or a constant. */
static void predicate_source(Parser *p, Inst *i) {
    if (accept(p, '!')) i->src_flip |= 1u << i->n_src;
    accept(p, '-');
    if (p->tok == TOK_NUMBER) { /* 0, 1 or -1 */
        add_src(p, i, const_slot(p, p->number ? ~0u : 0, 1, false));
        next(p);
    } else {
        add_src(p, i, predicate(p, false));
    }
}

/* An operand of mov: a register, or a list whose elements share the width. */
static void move_operand(Parser *p, Inst *i, bool dst, Type t, int bits) {
    if (t == T_PRED && dst)
        add_dst(p, i, predicate(p, true));
    else if (t == T_PRED)
        predicate_source(p, i);
    else if (at_punct(p, '{'))
        list_operand(p, i, dst, t, bits == 64 ? 16 : bits / 2, true);
    else
        list_operand(p, i, dst, t, bits, false);
}

/* A source of one register or constant, exactly as wide as the instruction says. */
static void single(Parser *p, Inst *i, Type t, int bits) {
    bool wide;
    add_src(p, i, source(p, t, bits, false, &wide));
}

/* Reads one operand as its letter says. */
static void operand(Parser *p, Inst *i, char letter) {
    Type t = i->type, t2 = i->type2;
    int bits = width_bits(t);
    bool wide;
    switch (letter) {
    case 'd':
        add_dst(p, i, t == T_PRED ? predicate(p, true) : destination(p, bits, false, &wide));
        break;
    case 'D': list_operand(p, i, true, t, bits, true); break;
    case 'e': add_dst(p, i, destination(p, bits * 2, false, &wide)); break;
    case 'u': add_dst(p, i, destination(p, 32, false, &wide)); break;
    case 'p': add_dst(p, i, predicate(p, true)); break;
    case 'V': list_operand(p, i, true, T_B32, 32, false); break;
    case 'a':
        if (t == T_PRED)
            predicate_source(p, i);
        else
            single(p, i, t, bits);
        break;
    case 'A': list_operand(p, i, false, t, bits, true); break;
    case 'X': case 'Y': move_operand(p, i, letter == 'X', t, bits); break;
    case 'n':
        if (p->tok != TOK_NUMBER || p->number > 255)
            ptx_fail(p, "expected a small integer constant before '%s'", p->word);
        i->vec = (u8)expect_number(p);
        break;
    case 't': add_src(p, i, source(p, t2, width_bits(t2), true, &i->wide_src)); break;
    case 'E': single(p, i, t, bits * 2); break;
    case 'w': single(p, i, T_B32, 32); break;
    case 'l': single(p, i, T_B64, 64); break;
    case 'q': predicate_source(p, i); break;
    case 'U': list_operand(p, i, false, T_B32, 32, false); break;
    case 'm': i->imm = address_operand(p, i, &i->wide_addr); break;
    case 'M': second_address(p, i); break;
    case 'i': i->imm = (int64_t)expect_number(p); break;
    case 'L':
        if (p->tok != TOK_WORD) ptx_fail(p, "expected a label");
        add_fixup(p, (u32)(i - p->code->inst), keep(p, p->word));
        next(p);
        break;
    default: abort();
    }
    if (strchr("dup", letter) && accept(p, '|')) i->dst_pred = predicate(p, true);
}

static void operands(Parser *p, Inst *i, const char *letters) {
    bool optional = false, first = true;
    for (; *letters; letters++) {
        if (*letters == '?') {
            optional = true;
            continue;
        }
        if (first ? optional && at_punct(p, ';') : !accept(p, ',')) {
            if (!optional) ptx_fail(p, "operands are missing");
            break;
        }
        operand(p, i, *letters);
        first = false;
    }
}

/* ---- instructions */

/* .v2 and .v4 need as many registers. */
static void check_vector(Parser *p, const Inst *i, const Form *f) {
    if (!strpbrk(f->operands, "DA") || i->class == SIM_C_CVT) return;
    int n = strchr(f->operands, 'D') ? i->n_dst : i->n_src - 1;
    if (n != (i->vec ? i->vec : 1))
        ptx_fail(p, "%d registers for a vector of %d", n, i->vec ? i->vec : 1);
}

/* Finds the function that will run it: by form, by type, or by the form's own choice. */
static void choose_handler(Parser *p, Inst *i, const Form *f, const char *opcode) {
    int size = type_bytes(i->type);
    Handler *typed = f->by_type[(size == 8 ? 4 : size == 4 ? 2 : 0) +
                                type_is_signed(i->type)];
    i->class = f->class;
    i->arg = f->arg;
    i->out_bits = f->out_bits;
    if (!i->out_bits && f->class == SIM_C_INT && i->n_dst)
        i->out_bits = size << (f->operands[0] == 'e') == 8 ? 64 : 32;
    i->run = f->choose ? f->choose(i) : f->run ? f->run : typed;
    if (f->run) i->inner = typed;
    if (!i->run) ptx_fail(p, "unsupported combination of types in '%s'", opcode);
    if (i->class == SIM_C_CVT || i->class == SIM_C_HALF || f->choose)
        return; /* these see to rounding, flushing and saturation themselves */
    bool rounded = i->round == RND_RZ || i->round == RND_RM || i->round == RND_RP;
    bool flushed = i->ftz && (i->type == T_F32 || i->type2 == T_F32);
    if (rounded || flushed || (i->sat && type_is_float(i->type))) {
        i->inner = i->run;
        i->run = run_wrapped;
    }
}

static void decode_instruction(Parser *p, u32 guard, bool flip) {
    char opcode[sizeof p->word];
    strcpy(opcode, p->word);
    int line = p->line;
    next(p);
    if (!strcmp(opcode, "call") || !strcmp(opcode, "call.uni")) {
        while (at_punct(p, '(') && p->tok != TOK_END) /* the result */
            while (p->tok != TOK_END && !accept(p, ',')) next(p);
        ptx_fail(p, "unsupported: call of '%s'", p->word);
    }
    const Form *f = find_form(p, opcode);
    u32 at = p->code->n_inst;
    Inst *i = new_inst(p);
    i->line = line;
    i->guard = guard;
    i->guard_flip = flip ? ~0u : 0;
    for (char *mod = opcode + strcspn(opcode, "."); *mod;) {
        char one[64];
        size_t n = 1 + strcspn(mod + 1, ".");
        snprintf(one, sizeof one, "%.*s", (int)n, mod);
        apply_modifier(i, one);
        mod += n;
    }
    operands(p, i, f->operands);
    expect(p, ';');
    int next_line = p->line;
    p->line = line;
    i = &p->code->inst[at];
    choose_handler(p, i, f, opcode);
    check_vector(p, i, f);
    p->code->global_atomics |= i->class == SIM_C_ATOMIC && i->space != SP_SHARED;
    p->line = next_line;
}

/* ---- bodies */

static void skip_statement(Parser *p) {
    while (p->tok != TOK_END && !at_punct(p, ';')) next(p);
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
            if (p->syms[i].kind == K_LABEL && !strcmp(p->syms[i].name, x->label)) s = &p->syms[i];
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
    if (at_word(p, ".loc"))
        parse_loc(p);
    else if (at_word(p, ".pragma"))
        skip_statement(p);
    else if (accept_word(p, ".reg"))
        declare_registers(p);
    else if (accept_word(p, ".shared"))
        declare_variable(p, K_SHARED, false);
    else if (accept_word(p, ".local") || accept_word(p, ".param")) /* .param of a call */
        declare_variable(p, K_LOCAL, false);
    else
        ptx_fail(p, "unsupported directive '%s' in a function", p->word);
}

/* "@%p add.u32 ...;" or without the guard. */
static void parse_guarded(Parser *p) {
    bool guarded = accept(p, '@'), flip = guarded && accept(p, '!');
    u32 guard = guarded ? predicate(p, false) : 0;
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
    if (at_punct(p, '{')) {
        parse_scope(p);
    } else if (accept(p, ';')) {
        ;
    } else if (at_label(p)) {
        add_symbol(p, keep(p, p->word), K_LABEL, p->code->n_inst);
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
    while (!at_punct(p, '}')) parse_statement(p);
    resolve_labels(p, syms, fixups);
    p->n_syms = syms;
    next(p);
}

/* ---- functions */

/* From "{" to behind the matching "}". */
static void skip_braces(Parser *p) {
    int depth = 0;
    do {
        if (p->tok == TOK_END) ptx_fail(p, "text ends inside a function");
        if (p->tok == TOK_PUNCT) depth += p->punct == '{' ? 1 : p->punct == '}' ? -1 : 0;
        next(p);
    } while (depth > 0);
}

/* ".func (ret) name (params) { ... }", or without a body. */
static void skip_func(Parser *p) {
    while (!at_punct(p, '{') && !at_punct(p, ';') && p->tok != TOK_END) next(p);
    if (!accept(p, ';')) skip_braces(p);
}

/* Kernel parameters lie one after the other, aligned, in the launch's parameter block. */
static void entry_params(Parser *p) {
    SimKernel *k = p->kernel;
    SimParam params[512];
    if (!accept(p, '(')) return;
    while (!accept(p, ')')) {
        if (!accept_word(p, ".param")) ptx_fail(p, "expected .param");
        Variable v = parse_variable(p);
        u32 at = place(p, &k->param_bytes, v.bytes, v.align, 4352, "parameter");
        if (k->n_params == 512) ptx_fail(p, "too many parameters");
        params[k->n_params++] = (SimParam){at, (u32)v.bytes, (u32)v.align};
        add_variable(p, &v, K_PARAM, at);
        accept(p, ',');
    }
    size_t bytes = (size_t)k->n_params * sizeof *params;
    k->params = memcpy(module_memory(p->m, bytes + 1), params, bytes);
}

/* .maxntid, .reqntid and the like, between the parameters and the body. */
static void entry_limits(Parser *p) {
    SimKernel *k = p->kernel;
    k->max_threads = 1024;
    while (p->tok == TOK_WORD && p->word[0] == '.') {
        bool required = at_word(p, ".reqntid"), threads = required || at_word(p, ".maxntid");
        if (!threads && !at_word(p, ".maxnreg") && !at_word(p, ".minnctapersm"))
            ptx_fail(p, "unsupported directive '%s'", p->word);
        unsigned n[3] = {1, 1, 1};
        int dim = 0;
        next(p);
        do
            n[dim++] = (unsigned)expect_number(p);
        while (dim < 3 && accept(p, ','));
        if (threads) k->max_threads = (int)(n[0] * n[1] * n[2]);
        if (required) memcpy(k->required_block, n, sizeof n);
    }
}

/* ".entry name (params) { body }" -> a kernel with its code. */
static void parse_entry(Parser *p) {
    SimModule *m = p->m;
    SimKernel *k = module_memory(m, sizeof *k);
    SimCode *c = zalloc(sizeof *c);
    m->kernels = xgrow(m->kernels, m->n_kernels, &m->cap_kernels, sizeof *m->kernels);
    m->kernels[m->n_kernels++] = k;
    *k = (SimKernel){.module = m, .code = c};
    k->name = expect_name(p);
    c->frame_bytes = 256; /* offset 0 is the sink of '_' */
    p->kernel = k;
    p->code = c;
    u32 n_module = p->n_syms;
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
    p->n_syms = n_module;
    k->shared_bytes = c->static_shared;
    k->local_bytes = c->local_bytes;
    analyse(m, k);
    p->code = NULL;
}

/* ---- modules */

/* ".version 7.4" */
static void parse_version(Parser *p) {
    p->m->version = (int)(bits_double(expect_number(p)) * 10 + 0.5);
    int limit = sim_options.ptx_version_max;
    if (limit && p->m->version > limit) {
        p->error = E_UNSUPPORTED_PTX_VERSION;
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
    if (p->m->target > sim_options.sm) {
        p->error = E_NO_BINARY_FOR_GPU;
        ptx_fail(p, "target sm_%d is newer than the device's sm_%d", p->m->target, sim_options.sm);
    }
    for (next(p); accept(p, ',');) next(p);
}

/* ".file 1 "name", ...": number 1 in .loc means this file. */
static void parse_file(Parser *p) {
    SimModule *m = p->m;
    u64 n = expect_number(p);
    if (n > 10000 || p->tok != TOK_STRING) ptx_fail(p, "bad .file");
    while (m->n_files <= n) {
        m->files = xgrow(m->files, m->n_files, &m->cap_files, sizeof *m->files);
        m->files[m->n_files++] = "";
    }
    m->files[n] = keep(p, p->word);
    for (next(p); accept(p, ',');) next(p);
}

/* One directive at module level. */
static void parse_top(Parser *p) {
    bool external = false;
    while (at_word(p, ".visible") || at_word(p, ".weak") || at_word(p, ".common") ||
           at_word(p, ".extern")) {
        external |= at_word(p, ".extern");
        next(p);
    }
    if (accept_word(p, ".version"))
        parse_version(p);
    else if (accept_word(p, ".target"))
        parse_target(p);
    else if (accept_word(p, ".address_size") && p->tok == TOK_NUMBER && p->number == 64)
        next(p);
    else if (accept_word(p, ".entry"))
        parse_entry(p);
    else if (accept_word(p, ".func"))
        skip_func(p);
    else if (accept_word(p, ".global"))
        declare_variable(p, K_GLOBAL, external);
    else if (accept_word(p, ".const"))
        declare_variable(p, K_CONST, external);
    else if (accept_word(p, ".shared"))
        declare_variable(p, K_SHARED, external);
    else if (accept_word(p, ".file"))
        parse_file(p);
    else if (at_word(p, ".pragma"))
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
    Parser *p = zalloc(sizeof *p);
    SimModule *m = zalloc(sizeof *m);
    m->device = device;
    *p = (Parser){.m = m, .p = ptx, .end = ptx + strnlen(ptx, size), .line = 1, .read_line = 1,
                  .log = log, .log_size = log_size};
    if (log_size) log[0] = 0;
    *module = NULL;
    if (!setjmp(p->fail)) {
        next(p);
        if (!at_word(p, ".version")) ptx_fail(p, "PTX must begin with .version");
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
    for (u32 k = 0; k < m->n_kernels; k++) {
        SimCode *c = m->kernels[k]->code;
        free(c->inst);
        free(c->consts);
        free(c);
    }
    for (u32 g = 0; g < m->n_globals; g++) {
        Alloc *a = mem_lookup(m->globals[g]);
        if (a && !a->freed) {
            a->module_global = false;
            sim_mem_free(a->base);
        }
    }
    free(m->kernels);
    free(m->globals);
    free(m->files);
    for (u32 k = 0; k < m->n_memory; k++) free(m->memory[k]);
    free(m->memory);
    free(m);
}

int sim_module_ptx_version(const SimModule *m) {
    return m->version;
}

SimKernel *sim_module_kernel(const SimModule *m, u32 index) {
    return index < m->n_kernels ? m->kernels[index] : NULL;
}

SimKernel *sim_module_find(const SimModule *m, const char *name) {
    for (u32 k = 0; k < m->n_kernels; k++)
        if (!strcmp(m->kernels[k]->name, name)) return m->kernels[k];
    return NULL;
}
