/* ptx_decode.c: one line of PTX -> one Inst, by the tables of forms; then dataflow over a kernel.
 *
 * The tables (alu_forms, ...) are the complete list of what is understood: an opcode, a modifier or
 * an operand that no row allows is refused by name. Letters of a form's operand list, where "type"
 * and "type2", "type3" are the types in the order they stand in the opcode:
 *   d destination of type             D of any width from type's up; a {list} with .v2 / .v4
 *   e destination of twice the width  u destination of 32 bits      p predicate destination, p|q
 *   V {list} of 32-bit destinations   v the same, or a single register
 *   a source of type   A of type's width or more, or a {list}   t source of type2   E of twice type
 *   w source of 32 bits   h of 16 bits   l of 64 bits   q predicate, may be !p
 *   U {list} of 32-bit sources, or one register   m [address]   i integer constant   L label
 *   X Y of mov   B of bar.red   M second [address]   n integer up to 255
 *   ? the operands after it may be absent
 * A destination may be followed by |p, a predicate (shfl, match). */
#include "ptx_parser.h"

/* ------------------------------------------------------------------------------------------------
 * opcodes */

/* What a modifier puts into which field of the instruction; the others change nothing here. */
#define FIELD(name) offsetof(Inst, name)
static const struct {
    const char *name;
    size_t field;
    u8 value;
} modifiers[] = {
    {".global", FIELD(space), SP_GLOBAL}, {".shared", FIELD(space), SP_SHARED},
    {".shared::cta", FIELD(space), SP_SHARED}, {".local", FIELD(space), SP_LOCAL},
    {".const", FIELD(space), SP_CONST}, {".param", FIELD(space), SP_PARAM},
    {".rn", FIELD(round), RND_RN}, {".rz", FIELD(round), RND_RZ}, {".rm", FIELD(round), RND_RM},
    {".rp", FIELD(round), RND_RP}, {".rna", FIELD(round), RND_RNA},
    {".rni", FIELD(round), RND_RNI}, {".rzi", FIELD(round), RND_RZI},
    {".rmi", FIELD(round), RND_RMI}, {".rpi", FIELD(round), RND_RPI},
    {".eq", FIELD(cmp), EQUAL}, {".ne", FIELD(cmp), LESS | GREATER},
    {".lt", FIELD(cmp), LESS}, {".le", FIELD(cmp), LESS | EQUAL},
    {".gt", FIELD(cmp), GREATER}, {".ge", FIELD(cmp), GREATER | EQUAL},
    {".lo", FIELD(cmp), LESS}, {".ls", FIELD(cmp), LESS | EQUAL}, /* unsigned */
    {".hi", FIELD(cmp), GREATER}, {".hs", FIELD(cmp), GREATER | EQUAL},
    {".equ", FIELD(cmp), EQUAL | UNORDERED}, {".neu", FIELD(cmp), LESS | GREATER | UNORDERED},
    {".ltu", FIELD(cmp), LESS | UNORDERED}, {".leu", FIELD(cmp), LESS | EQUAL | UNORDERED},
    {".gtu", FIELD(cmp), GREATER | UNORDERED}, {".geu", FIELD(cmp), GREATER | EQUAL | UNORDERED},
    {".num", FIELD(cmp), LESS | EQUAL | GREATER}, {".nan", FIELD(cmp), UNORDERED},
    {".and", FIELD(op), OP_AND}, {".or", FIELD(op), OP_OR}, {".xor", FIELD(op), OP_XOR},
    {".add", FIELD(op), OP_ADD}, {".min", FIELD(op), OP_MIN}, {".max", FIELD(op), OP_MAX},
    {".inc", FIELD(op), OP_INC}, {".dec", FIELD(op), OP_DEC}, {".exch", FIELD(op), OP_EXCH},
    {".cas", FIELD(op), OP_CAS}, {".up", FIELD(op), OP_UP}, {".down", FIELD(op), OP_DOWN},
    {".bfly", FIELD(op), OP_BFLY}, {".idx", FIELD(op), OP_IDX}, {".all", FIELD(op), OP_ALL},
    {".any", FIELD(op), OP_ANY}, {".uni", FIELD(op), OP_UNI}, {".ballot", FIELD(op), OP_BALLOT},
    {".popc", FIELD(op), OP_POPC}, {".f4e", FIELD(op), OP_F4E}, {".b4e", FIELD(op), OP_B4E},
    {".rc8", FIELD(op), OP_RC8}, {".ecl", FIELD(op), OP_ECL}, {".ecr", FIELD(op), OP_ECR},
    {".rc16", FIELD(op), OP_RC16}, {".v2", FIELD(vec), 2}, {".v4", FIELD(vec), 4},
    {".x1", FIELD(vec), 1}, {".x2", FIELD(vec), 2}, {".x4", FIELD(vec), 4},
    {".ftz", FIELD(ftz), 1}, {".sat", FIELD(sat), 1}, {".satfinite", FIELD(sat), 1},
    {".volatile", FIELD(strong), 1}, {".relaxed", FIELD(strong), 1}, {".acquire", FIELD(fence), 1},
    {".release", FIELD(fence), 1}, {".acq_rel", FIELD(fence), 1}, {".NaN", FIELD(nan), 1},
    {".relu", FIELD(relu), 1}, {".to", FIELD(to), 1}, {".trans", FIELD(trans), 1},
    {".l", FIELD(left), 1}, {".wrap", FIELD(wrap), 1}, {".shiftamt", FIELD(shiftamt), 1},
    {".hi", FIELD(high), 1}, {".cc", FIELD(carry), 1},
};

/* One ".modifier": a type, or entries of the table above; of two state spaces the first counts. */
static void apply_modifier(Inst *i, const char *name) {
    Type t = parse_type(name);
    if (t != T_NONE) {
        u8 *to = !i->type ? &i->type : !i->type2 ? &i->type2 : &i->type3;
        *to = *to ? *to : (u8)t; /* the fourth, of mma, repeats the first */
        return;
    }
    for (size_t k = 0; k < sizeof modifiers / sizeof *modifiers; k++) {
        u8 *field = (u8 *)i + modifiers[k].field;
        if (!*field && !strcmp(name, modifiers[k].name)) *field = modifiers[k].value;
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
    *reach = 0;
    if (n != name || memcmp(pattern, opcode, n)) return false;
    const char *mod = opcode + n, *e = pattern + n;
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

/* ------------------------------------------------------------------------------------------------
 * operands */

static const char *const special_names[SR_COUNT] = {
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y",
    "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid",
    "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge",
    "%dynamic_smem_size", "%total_smem_size", "%smid", "%nsmid", "%gridid", "%clock", "%clock_hi",
    "%clock64", "%globaltimer"};

/* %tid.x and its like live in slots that are filled before a warp starts. */
static u32 special_slot(Parser *p, const char *name, int *which) {
    for (int k = 0; k < SR_COUNT; k++)
        if (!strcmp(name, special_names[k])) {
            if (!p->code->special[k])
                p->code->special[k] = new_slot(p, k >= SR_GRIDID ? 64 : 32);
            *which = k;
            return p->code->special[k];
        }
    return 0;
}

static int width_bits(Type t) {
    return t == T_PRED ? 1 : type_bytes(t) * 8;
}

/* The bits of an immediate as an operand of `bits` bits and of type `type`. */
static u64 immediate(Parser *p, Type type, int bits, bool minus) {
    u64 v = p->number;
    if (p->is_float && !type_is_float(type) && p->float_bits != bits)
        ptx_fail(p, "floating-point constant for an integer operand");
    if (p->is_float && p->float_bits == 64 && bits == 32) {
        double d;
        memcpy(&d, &v, 8);
        float f = (float)d;
        v = 0;
        memcpy(&v, &f, 4);
    }
    if (minus) v = p->is_float ? v ^ 1ull << (bits - 1) : 0 - v;
    if (!p->is_float && (type == T_F32 || type == T_F64))
        ptx_fail(p, "integer constant for a floating-point operand");
    return bits == 64 ? v : v & ((1ull << bits) - 1);
}

static void wrong_width(Parser *p, const char *name, Type have, int want) {
    ptx_fail(p, "operand '%s' has %d bits, the instruction needs %d", name, width_bits(have), want);
}

/* A single source of at least `bits` bits (exactly, unless `relaxed`). Returns its slot. */
static u32 source(Parser *p, Type type, int bits, bool relaxed, bool *wide) {
    bool minus = accept(p, '-');
    int which;
    u32 at;
    if (p->tok == TOK_NUMBER) {
        u32 s = const_slot(p, immediate(p, type, bits, minus), bits > 32 ? 64 : 32, false);
        if (wide) *wide = bits > 32;
        next(p);
        return s;
    }
    if (p->tok != TOK_WORD || minus) ptx_fail(p, "bad operand '%s'", p->word);
    Symbol *s = find_symbol(p, p->word, &at);
    if (s && s->kind == K_REG) {
        if (s->type == T_PRED || (relaxed ? width_bits(s->type) < bits
                                          : width_bits(s->type) != bits))
            wrong_width(p, p->word, s->type, bits);
        if (wide) *wide = width_bits(s->type) == 64;
    } else if (s && s->kind != K_LABEL && s->kind != K_FUNC) {
        u64 v = symbol_address(p, s);
        bool dynamic = s->dynamic;
        next(p);
        if (accept(p, '+')) {
            v += p->number;
            next(p);
        }
        return const_slot(p, v, bits > 32 ? 64 : 32, dynamic);
    } else if (!s && !strcmp(p->word, "WARP_SZ")) {
        at = const_slot(p, 32, bits > 32 ? 64 : 32, false);
    } else if (!s && (at = special_slot(p, p->word, &which)) != 0) {
        if ((which >= SR_GRIDID ? 64 : 32) < bits)
            ptx_fail(p, "operand '%s' is too narrow", p->word);
        if (wide) *wide = which >= SR_GRIDID;
    } else {
        ptx_fail(p, "'%s' is not declared", p->word);
    }
    next(p);
    return at;
}

/* The slot of a predicate register; "_" as a destination is the sink. */
static u32 predicate(Parser *p, bool destination) {
    u32 at = 0;
    if (destination && accept_word(p, "_")) return 0;
    Symbol *s = p->tok == TOK_WORD ? find_symbol(p, p->word, &at) : NULL;
    if (!s || s->kind != K_REG || s->type != T_PRED)
        ptx_fail(p, "'%s' is not a predicate", p->word);
    next(p);
    return at;
}

/* A register to write, of `bits` bits or (relaxed) more. */
static u32 destination(Parser *p, int bits, bool relaxed, bool *wide) {
    u32 at = 0;
    if (accept_word(p, "_")) return 0;
    Symbol *s = p->tok == TOK_WORD ? find_symbol(p, p->word, &at) : NULL;
    if (!s || s->kind != K_REG || s->type == T_PRED) ptx_fail(p, "'%s' is not a register", p->word);
    if (relaxed ? width_bits(s->type) < bits : width_bits(s->type) != bits)
        wrong_width(p, p->word, s->type, bits);
    if (wide) *wide = width_bits(s->type) == 64;
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
    *wide = true;
    expect(p, '[');
    if (p->tok == TOK_NUMBER) {
        at = const_slot(p, p->number, 64, false);
        next(p);
    } else {
        Symbol *s = p->tok == TOK_WORD ? find_symbol(p, p->word, &at) : NULL;
        if (!s || s->kind == K_LABEL || s->kind == K_FUNC || s->type == T_PRED)
            ptx_fail(p, "bad address '%s'", p->word);
        if (s->kind == K_REG) {
            *wide = width_bits(s->type) == 64;
            if (width_bits(s->type) < 32) wrong_width(p, p->word, s->type, 64);
        } else {
            at = const_slot(p, symbol_address(p, s), 64, s->dynamic);
            if (i->space == SP_PARAM && s->kind == K_LOCAL)
                i->space = SP_LOCAL; /* parameters of an inlined call */
        }
        next(p);
    }
    while (p->tok == TOK_PUNCT && (p->punct == '+' || p->punct == '-')) {
        bool minus = p->punct == '-';
        next(p);
        minus ^= accept(p, '-');
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
    do {
        bool *wide = dst ? &i->wide_dst : &i->wide_src;
        if (dst)
            add_dst(p, i, destination(p, bits, relaxed, wide));
        else
            add_src(p, i, source(p, type, bits, relaxed, wide));
    } while (braces && accept(p, ','));
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
    else if (p->tok == TOK_PUNCT && p->punct == '{')
        list_operand(p, i, dst, t, bits == 64 ? 16 : bits / 2, true);
    else
        list_operand(p, i, dst, t, bits, false);
}

static bool is_predicate(Parser *p) {
    u32 at;
    Symbol *s = p->tok == TOK_WORD ? find_symbol(p, p->word, &at) : NULL;
    return (p->tok == TOK_PUNCT && p->punct == '!') || (s && s->kind == K_REG && s->type == T_PRED);
}

/* Reads one operand as its letter says. */
static void operand(Parser *p, Inst *i, char letter) {
    Type t = (Type)i->type, t2 = (Type)i->type2;
    int bits = width_bits(t);
    switch (letter) {
    case 'd':
        add_dst(p, i, t == T_PRED ? predicate(p, true) : destination(p, bits, false, NULL));
        break;
    case 'D': list_operand(p, i, true, t, bits, true); break;
    case 'e': add_dst(p, i, destination(p, bits * 2, false, NULL)); break;
    case 'u': add_dst(p, i, destination(p, 32, false, NULL)); break;
    case 'p': add_dst(p, i, predicate(p, true)); break;
    case 'V': case 'v': list_operand(p, i, true, T_B32, 32, false); break;
    case 'a':
        if (t == T_PRED)
            predicate_source(p, i);
        else
            add_src(p, i, source(p, t, bits, false, NULL));
        break;
    case 'A': list_operand(p, i, false, t, bits, true); break;
    case 'X': case 'Y': move_operand(p, i, letter == 'X', t, bits); break;
    case 'B': /* bar.red: an optional number of threads, then a predicate */
        if (p->tok == TOK_NUMBER || !is_predicate(p)) {
            add_src(p, i, source(p, T_B32, 32, false, NULL));
            expect(p, ',');
        } else {
            add_src(p, i, const_slot(p, 0, 32, false));
        }
        predicate_source(p, i);
        break;
    case 'n':
        if (p->tok != TOK_NUMBER || p->number > 255)
            ptx_fail(p, "expected a small integer constant before '%s'", p->word);
        i->vec = (u8)p->number;
        next(p);
        break;
    case 't': add_src(p, i, source(p, t2, width_bits(t2), true, &i->wide_src)); break;
    case 'E': add_src(p, i, source(p, t, bits * 2, false, NULL)); break;
    case 'w': add_src(p, i, source(p, T_B32, 32, false, NULL)); break;
    case 'h': add_src(p, i, source(p, T_B16, 16, false, NULL)); break;
    case 'l': add_src(p, i, source(p, T_B64, 64, false, NULL)); break;
    case 'q': predicate_source(p, i); break;
    case 'U': list_operand(p, i, false, T_B32, 32, false); break;
    case 'm': i->imm = address_operand(p, i, &i->wide_addr); break;
    case 'M': second_address(p, i); break;
    case 'i':
        if (p->tok != TOK_NUMBER) ptx_fail(p, "expected an integer constant before '%s'", p->word);
        i->imm = (int64_t)p->number;
        next(p);
        break;
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
        if (first ? optional && p->tok == TOK_PUNCT && p->punct == ';' : !accept(p, ',')) {
            if (!optional) ptx_fail(p, "operands are missing");
            break;
        }
        operand(p, i, *letters);
        first = false;
    }
}

/* ------------------------------------------------------------------------------------------------
 * instructions */

/* The handler that reads %clock and the other registers that change by themselves. */
static bool reads_clock(const SimCode *c, const Inst *i) {
    for (int k = SR_CLOCK; k < SR_COUNT; k++)
        for (int s = 0; s < i->n_src; s++)
            if (c->special[k] && i->src[s] == c->special[k]) return true;
    return false;
}

/* .v2 and .v4 need as many registers. */
static void check_vector(Parser *p, const Inst *i, const Form *f) {
    if (!strpbrk(f->operands, "DA") || i->class == SIM_C_CVT) return;
    int n = strchr(f->operands, 'D') ? i->n_dst : i->n_src - 1;
    if (n != (i->vec ? i->vec : 1))
        ptx_fail(p, "%d registers for a vector of %d", n, i->vec ? i->vec : 1);
}

/* Finds the function that will run it: by form, by type, or by the form's own choice. */
static void choose_handler(Parser *p, Inst *i, const Form *f, const char *opcode) {
    int size = type_bytes((Type)i->type);
    Handler *typed = f->by_type[(size == 8 ? 4 : size == 4 ? 2 : 0) +
                                type_is_signed((Type)i->type)];
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
    if (rounded || flushed || (i->sat && type_is_float((Type)i->type))) {
        i->inner = i->run;
        i->run = run_wrapped;
    }
}

void decode_instruction(Parser *p, u32 guard, bool flip) {
    char opcode[sizeof p->word];
    strcpy(opcode, p->word);
    int line = p->line;
    next(p);
    if (!strcmp(opcode, "call") || !strcmp(opcode, "call.uni")) {
        parse_call(p, guard, flip);
        return;
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
    if (reads_clock(p->code, i)) {
        if (strncmp(opcode, "mov.", 4)) ptx_fail(p, "clock registers can only be moved");
        i->run = run_clock;
        i->out_bits = 0;
    }
    if (i->run == run_exit && !strcmp(opcode, "ret") && p->return_label) {
        i->run = run_bra;
        add_fixup(p, at, p->return_label);
    }
    p->line = next_line;
}

/* ------------------------------------------------------------------------------------------------
 * dataflow: which reads may see a register that nothing wrote, and how many are live at once
 *
 * Slots are numbered offset / 32. A register is "maybe unset" at a read if some path from the
 * entry has no write; only those are tracked at run time, so that correct code pays nothing. */

typedef struct {
    u32 first, last;   /* instructions */
    int next[2];       /* successors, -1: none */
    u64 *set, *in;     /* registers that are certainly set at the end / at the beginning */
} Basic;

static bool ends_block(const Inst *i) {
    return i->run == run_bra || i->run == run_exit || i->run == run_trap || i->run == run_assert;
}

/* Cuts the code into basic blocks: at targets, and behind branches and ends. */
static u32 find_blocks(const SimCode *c, Basic **out, int *of_inst) {
    u8 *leader = calloc(c->n_inst + 1, 1);
    Basic *b = NULL;
    u32 n = 0, cap = 0;
    if (!leader) abort();
    for (u32 k = 0; k < c->n_inst; k++) {
        if (c->inst[k].run == run_bra) leader[c->inst[k].target] = 1;
        if (ends_block(&c->inst[k])) leader[k + 1] = 1;
    }
    for (u32 k = 0; k < c->n_inst; k++) {
        if (k == 0 || leader[k]) {
            b = xgrow(b, n, &cap, sizeof *b);
            b[n++] = (Basic){.first = k, .next = {-1, -1}};
        }
        b[n - 1].last = k;
        of_inst[k] = (int)n - 1;
    }
    for (u32 k = 0; k < n; k++) {
        const Inst *i = &c->inst[b[k].last];
        if (!ends_block(i) || i->guard) b[k].next[0] = k + 1 < n ? (int)k + 1 : -1;
        if (i->run == run_bra) b[k].next[1] = of_inst[i->target];
    }
    free(leader);
    *out = b;
    return n;
}

static bool is_register(const u8 *fixed, u32 offset) {
    return offset && !fixed[offset / 32];
}

/* Marks slots that are set from the start: constants, special registers, the sink. */
static u8 *fixed_slots(const SimCode *c) {
    u8 *fixed = calloc(c->frame_bytes / 32 + 1, 1);
    if (!fixed) abort();
    for (u32 k = 0; k < c->n_consts; k++) fixed[c->consts[k].offset / 32] = 1;
    for (int k = 0; k < SR_COUNT; k++) fixed[c->special[k] / 32] = 1;
    fixed[0] = 1;
    return fixed;
}

#define BIT_GET(set, n) ((set)[(n) / 64] >> ((n) % 64) & 1)
#define BIT_ADD(set, n) ((set)[(n) / 64] |= 1ull << ((n) % 64))

/* Adds what an instruction certainly writes: nothing under a guard. */
static void add_writes(const Inst *i, u64 *set) {
    if (i->guard) return;
    for (int k = 0; k < i->n_dst; k++) BIT_ADD(set, i->dst[k] / 32);
    BIT_ADD(set, i->dst_pred / 32);
}

static void reads_of(const Inst *i, u32 *out, int *n) {
    *n = 0;
    for (int k = 0; k < i->n_src; k++) out[(*n)++] = i->src[k];
    if (i->guard) out[(*n)++] = i->guard;
}

/* Solves in = AND over predecessors of (in | set); entry: nothing is set. */
static void definitely_set(Basic *b, u32 n, u32 words) {
    for (bool changed = true; changed;) {
        changed = false;
        for (u32 k = 0; k < n; k++)
            for (int s = 0; s < 2; s++) {
                if (b[k].next[s] < 0) continue;
                u64 *to = b[b[k].next[s]].in;
                for (u32 w = 0; w < words; w++) {
                    u64 v = to[w] & (b[k].in[w] | b[k].set[w]);
                    changed |= v != to[w];
                    to[w] = v;
                }
            }
    }
}

/* Walks each block with what is set at its start, and marks reads that are not covered. */
static void mark_checks(SimCode *c, Basic *b, u32 n, u32 words, const u8 *fixed) {
    u8 *tracked = calloc(c->frame_bytes / 32 + 1, 1);
    u64 *now = malloc(words * 8);
    if (!tracked || !now) abort();
    for (u32 k = 0; k < n; k++) {
        memcpy(now, b[k].in, words * 8);
        for (u32 x = b[k].first; x <= b[k].last; x++) {
            Inst *i = &c->inst[x];
            u32 reads[MAX_SRC + 1];
            int n_reads;
            reads_of(i, reads, &n_reads);
            for (int r = 0; r < n_reads; r++)
                if (is_register(fixed, reads[r]) && !BIT_GET(now, reads[r] / 32)) {
                    tracked[reads[r] / 32] = 1;
                    i->check_init = c->track_init = true;
                }
            for (int r = 0; r < n_reads && i->check_init; r++) /* it will look at all of them */
                tracked[reads[r] / 32] |= is_register(fixed, reads[r]);
            add_writes(i, now);
        }
    }
    for (bool more = true; more;) { /* a copy's source is tracked if the copy is */
        more = false;
        for (u32 x = 0; x < c->n_inst; x++) {
            Inst *i = &c->inst[x];
            bool copy = i->class == SIM_C_INT && i->n_src == 1 && i->n_dst == 1;
            if (copy && tracked[i->dst[0] / 32] && is_register(fixed, i->src[0])) {
                more |= !tracked[i->src[0] / 32];
                tracked[i->src[0] / 32] = 1;
            }
            i->copy_init = copy && tracked[i->src[0] / 32];
        }
    }
    for (u32 x = 0; x < c->n_inst; x++) {
        Inst *i = &c->inst[x];
        for (int k = 0; k < i->n_dst; k++) i->note_init |= tracked[i->dst[k] / 32];
        i->note_init |= tracked[i->dst_pred / 32];
    }
    free(now);
    free(tracked);
}

/* Largest number of 32-bit registers live at once: backward over the blocks until nothing changes,
 * `in` and `set` serve as live-in sets and scratch. An upper estimate of what ptxas needs. */
static int pressure(const SimCode *c, Basic *b, u32 n, u32 words, const u8 *fixed, const u8 *width)
{
    int most = 0;
    for (u32 k = 0; k < n; k++) memset(b[k].in, 0, words * 8);
    for (bool changed = true; changed;) {
        changed = false;
        for (u32 k = n; k-- > 0;) {
            u64 *live = b[k].set;
            memset(live, 0, words * 8);
            for (int s = 0; s < 2; s++)
                for (u32 w = 0; b[k].next[s] >= 0 && w < words; w++)
                    live[w] |= b[b[k].next[s]].in[w];
            int count = 0;
            for (u32 r = 0; r < words * 64; r++)
                count += BIT_GET(live, r) ? width[r] : 0;
            for (u32 x = b[k].last + 1; x-- > b[k].first;) {
                const Inst *i = &c->inst[x];
                u32 reads[MAX_SRC + 1];
                int n_reads;
                for (int d = 0; d < i->n_dst; d++)
                    if (!i->guard && BIT_GET(live, i->dst[d] / 32)) {
                        live[i->dst[d] / 32 / 64] &= ~(1ull << (i->dst[d] / 32 % 64));
                        count -= width[i->dst[d] / 32];
                    }
                reads_of(i, reads, &n_reads);
                for (int r = 0; r < n_reads; r++)
                    if (is_register(fixed, reads[r]) && !BIT_GET(live, reads[r] / 32)) {
                        BIT_ADD(live, reads[r] / 32);
                        count += width[reads[r] / 32];
                    }
                most = count > most ? count : most;
            }
            changed |= memcmp(b[k].in, live, words * 8) != 0;
            memcpy(b[k].in, live, words * 8);
        }
    }
    return most;
}

void analyse(SimModule *m, SimKernel *kernel) {
    SimCode *c = kernel->code;
    int *of_inst = malloc((c->n_inst + 1) * sizeof *of_inst);
    Basic *b;
    if (!of_inst) abort();
    u32 n = find_blocks(c, &b, of_inst), words = c->frame_bytes / 32 / 64 + 1;
    u8 *fixed = fixed_slots(c), *width = calloc((size_t)words * 64, 1);
    u64 *sets = calloc((size_t)n * 2 * words, 8);
    if (!sets || !width) abort();
    for (u32 k = 0; k < n; k++) {
        b[k].set = sets + (size_t)k * 2 * words;
        b[k].in = b[k].set + words;
        memset(b[k].in, k ? 0xff : 0, words * 8);
        for (u32 x = b[k].first; x <= b[k].last; x++)
            add_writes(&c->inst[x], b[k].set);
    }
    definitely_set(b, n, words);
    mark_checks(c, b, n, words, fixed);
    for (u32 x = 0; x < c->n_inst; x++)
        for (int d = 0; d < c->inst[x].n_dst; d++)
            width[c->inst[x].dst[d] / 32] = c->inst[x].out_bits == 64 || c->inst[x].wide_dst ? 2
                                          : c->inst[x].out_bits == 1 ? 0 : 1;
    kernel->registers = pressure(c, b, n, words, fixed, width);
    kernel->const_bytes = m->const_bytes;
    free(sets);
    free(width);
    free(fixed);
    free(of_inst);
    free(b);
}
