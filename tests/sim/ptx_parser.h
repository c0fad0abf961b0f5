/* ptx_parser.h: what ptx_parse.c (text, symbols, scopes) and ptx_decode.c (opcodes) share. */
#ifndef PTX_PARSER_H
#define PTX_PARSER_H

#include "ptx.h"

#include <setjmp.h>

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

void ptx_fail(Parser *p, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
void next(Parser *p);
bool accept(Parser *p, int punct);
void expect(Parser *p, int punct);
bool at_punct(const Parser *p, int punct);
bool at_word(const Parser *p, const char *word);
bool accept_word(Parser *p, const char *word);
u64 expect_number(Parser *p);
u64 to_f32(u64 double_pattern);
char *keep(Parser *p, const char *text); /* a copy that lives as long as the module */
Symbol *named(Parser *p, u32 *slot); /* what the token names */
u64 symbol_address(Parser *p, Symbol *s); /* gives module-level shared variables their place */
u32 new_slot(Parser *p, int bits);
u32 predicate(Parser *p, bool destination); /* a predicate register; as a destination also "_" */
u32 const_slot(Parser *p, u64 value, int bits, bool dynamic);
int word_index(const char *list, const char *word); /* 1 ..., 0: not in the list */
Type parse_type(const char *dotted);
void add_fixup(Parser *p, u32 inst, const char *label);
Inst *new_inst(Parser *p);

/* ptx_decode.c: the current token is the opcode (after a guard, if any); reads up to ';'. */
void decode_instruction(Parser *p, u32 guard, bool flip);

#endif
