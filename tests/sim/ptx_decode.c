/* ptx_decode.c: one line of PTX -> one Inst, by the tables of forms; then dataflow over a kernel.
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
#include "ptx_parser.h"

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
    "%lanemask_ge %dynamic_smem_size %total_smem_size %smid %nsmid %gridid %clock %clock_hi "
    "%clock64 %globaltimer";

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

u32 predicate(Parser *p, bool destination) {
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

/* %clock and the other registers that change by themselves. */
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

void decode_instruction(Parser *p, u32 guard, bool flip) {
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
    if (reads_clock(p->code, i)) {
        if (strncmp(opcode, "mov.", 4)) ptx_fail(p, "clock registers can only be moved");
        i->run = run_clock;
        i->out_bits = 0;
    }
    p->line = next_line;
}

/* ---- dataflow: a register is live where some path leads to a read of it without a write before.
 * Those that are live at the entry may be read unset: they alone are tracked at run time, so that
 * correct code pays nothing. The most registers live at once estimate what ptxas allots. */

typedef struct {
    u32 first, last;   /* instructions */
    int next[2];       /* successors, -1: none */
    u64 *live;         /* at its beginning: a bit per slot, numbered offset / 32 */
} Basic;

enum { FIXED = 255 };  /* width of slots that are set from the start, which are never live */

static bool ends_block(const Inst *i) {
    return i->run == run_bra || i->run == run_exit || i->run == run_trap;
}

/* Cuts the code into basic blocks: at targets, and behind branches and ends. */
static Basic *find_blocks(const SimCode *c, u32 *n_blocks) {
    u8 *leader = zalloc(c->n_inst + 1);
    int *of_inst = zalloc(c->n_inst * sizeof *of_inst);
    Basic *b = NULL;
    u32 n = 0, cap = 0;
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
    free(of_inst);
    *n_blocks = n;
    return b;
}

/* How many 32-bit registers each slot takes: none if it is a predicate. */
static u8 *slot_widths(const SimCode *c, u32 n_slots) {
    u8 *width = zalloc(n_slots);
    for (u32 x = 0; x < c->n_inst; x++)
        for (int d = 0; d < c->inst[x].n_dst; d++)
            width[c->inst[x].dst[d] / 32] = c->inst[x].out_bits == 64 || c->inst[x].wide_dst ? 2
                                          : c->inst[x].out_bits == 1 ? 0 : 1;
    for (u32 k = 0; k < c->n_consts; k++) width[c->consts[k].offset / 32] = FIXED;
    for (int k = 0; k < SR_COUNT; k++) width[c->special[k] / 32] = FIXED;
    width[0] = FIXED; /* the sink */
    return width;
}

static bool is_live(const u64 *live, u32 offset) {
    return live[offset / 32 / 64] >> (offset / 32 % 64) & 1;
}

/* Makes a slot live or not; returns by how many registers there are more of them. */
static int set_live(u64 *live, u32 offset, bool on, const u8 *width) {
    u32 slot = offset / 32;
    if (width[slot] == FIXED || is_live(live, offset) == on) return 0;
    live[slot / 64] ^= 1ull << (slot % 64);
    return on ? width[slot] : -width[slot];
}

/* From the end of a block to its beginning; returns the most registers in between. A write under a
 * guard may leave the old value. */
static int walk_back(const SimCode *c, const Basic *b, u64 *live, const u8 *width) {
    int count = 0, most = 0;
    for (u32 offset = 0; offset < c->frame_bytes; offset += 32)
        count += is_live(live, offset) ? width[offset / 32] : 0;
    for (u32 x = b->last + 1; x-- > b->first;) {
        const Inst *i = &c->inst[x];
        for (int d = 0; d < i->n_dst && !i->guard; d++)
            count += set_live(live, i->dst[d], false, width);
        if (!i->guard) count += set_live(live, i->dst_pred, false, width);
        for (int k = 0; k < i->n_src; k++) count += set_live(live, i->src[k], true, width);
        count += set_live(live, i->guard, true, width);
        most = count > most ? count : most;
    }
    return most;
}

/* Backward over the blocks until nothing changes; returns the most registers at any place. */
static int find_live(const SimCode *c, Basic *b, u32 n, u32 words, const u8 *width) {
    int most = 0;
    u64 *live = zalloc(words * 8);
    for (bool changed = true; changed;) {
        changed = false;
        for (u32 k = n; k-- > 0;) {
            memset(live, 0, words * 8);
            for (int s = 0; s < 2; s++)
                for (u32 w = 0; b[k].next[s] >= 0 && w < words; w++)
                    live[w] |= b[b[k].next[s]].live[w];
            int here = walk_back(c, &b[k], live, width);
            most = here > most ? here : most;
            changed |= memcmp(b[k].live, live, words * 8) != 0;
            memcpy(b[k].live, live, words * 8);
        }
    }
    free(live);
    return most;
}

/* Notes which instructions read or write registers that are tracked, those of `set`. */
static void mark_checks(SimModule *m, SimCode *c, const u64 *set) {
    c->tracked = module_memory(m, c->frame_bytes / 32 * sizeof *c->tracked);
    for (u32 offset = 0; offset < c->frame_bytes; offset += 32)
        if (is_live(set, offset)) c->tracked[c->n_tracked++] = offset / 32;
    for (u32 x = 0; x < c->n_inst && c->n_tracked; x++) {
        Inst *i = &c->inst[x];
        i->check_init = is_live(set, i->guard);
        for (int k = 0; k < i->n_src; k++) i->check_init |= is_live(set, i->src[k]);
        i->copy_init = i->check_init && i->class == SIM_C_INT && i->n_src == 1 && i->n_dst == 1;
        i->note_init = is_live(set, i->dst_pred);
        for (int k = 0; k < i->n_dst; k++) i->note_init |= is_live(set, i->dst[k]);
    }
}

void analyse(SimModule *m, SimKernel *kernel) {
    SimCode *c = kernel->code;
    u32 n, words = c->frame_bytes / 32 / 64 + 1;
    Basic *b = find_blocks(c, &n);
    u8 *width = slot_widths(c, words * 64);
    u64 *sets = zalloc((size_t)n * words * 8);
    for (u32 k = 0; k < n; k++) b[k].live = sets + (size_t)k * words;
    kernel->registers = find_live(c, b, n, words, width);
    kernel->const_bytes = m->const_bytes;
    mark_checks(m, c, b[0].live);
    free(sets);
    free(width);
    free(b);
}
