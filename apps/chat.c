// Chat format: messages -> prompt text; what the model writes -> reasoning, content, tool calls.
// Its two generations, "v4" and "0731", differ in the effort prefix. Tags are text until tokenized.

#define _GNU_SOURCE     // memmem
#include "dsv4.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DSML "｜DSML｜"
#define CALLS_START "\n\n<" DSML "tool_calls"
#define CALLS_END "</" DSML "tool_calls>"


static const char *const role_names[] = { "system", "user", "assistant", "tool", "developer",
                                          "latest_reminder" };
static const char *const effort_names[] = { "none", "low", "high", "max" };

static void chat_cut(Chat *c, size_t n) {               // keeps the first n turns
    while (c->n > n) {
        Turn *t = &c->turns[--c->n];
        for (size_t i = 0; i < t->n_blocks; i++) {
            free(t->blocks[i].text.p);
            free(t->blocks[i].id.p);
        }
        free(t->blocks);
        free(t->reasoning.p);
        free(t->extra.p);
        map_free(&t->calls);
    }
}

void chat_free(Chat *c) {
    chat_cut(c, 0);
    free(c->turns);
    *c = (Chat){ 0 };
}

// Appends a message whose text is known: the terminal's chat. Users in a row become one turn.
Turn *chat_say(Chat *c, Role role, Span content, Span reasoning, bool context) {
    Turn *last = c->n ? &c->turns[c->n - 1] : NULL;
    bool user = role == ROLE_USER || role == ROLE_TOOL;
    bool open = user && last && last->role == ROLE_USER && last->context == context;
    if (!open || (role == ROLE_USER && last->task[0])) {
        c->turns = grow(c->turns, c->n, sizeof *c->turns);
        last = &c->turns[c->n++];
        last->role = user ? ROLE_USER : role;
        last->context = context;
    }
    last->blocks = grow(last->blocks, last->n_blocks, sizeof *last->blocks);
    Block *b = &last->blocks[last->n_blocks++];
    b->is_result = role == ROLE_TOOL;
    str_add(&b->text, content.p, content.n);
    str_add(&last->reasoning, reasoning.p, reasoning.n);
    return last;
}

// ---- reading messages

// The text of a content: a string, null, or a list of parts joined by empty lines. Of parts other
// than text a tool result keeps the type; elsewhere they are refused.
static void read_content(Json *j, bool tool_result, Str *out) {
    if (json_peek(j) != '[') {
        json_string(j, out);
        return;
    }
    Str key = { 0 }, type = { 0 }, text = { 0 };
    json_array(j);
    for (int i = 0; json_item(j); i++) {
        type.n = text.n = 0;
        for (json_object(j); json_member(j, &key);) {
            if (str_is(&key, "type")) json_string(j, &type);
            else if (str_is(&key, "text") && json_peek(j) == '"') json_string(j, &text);
            else json_skip(j);
        }
        if (i) str_puts(out, "\n\n");
        bool is_text = str_is(&type, "text");
        if (!is_text && !tool_result)
            json_fail(j, "content part of type \"%.*s\": only text", SHOWN(type));
        if (!is_text) str_puts(out, "[Unsupported ");
        str_add(out, is_text ? text.p : type.p, is_text ? text.n : type.n);
        if (!is_text) str_puts(out, "]");
    }
    free(key.p);
    free(type.p);
    free(text.p);
}

static const char tools_head[] =
    "## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. You can invoke tools by "
    "writing a \"<" DSML "tool_calls>\" block like the following:\n\n"
    "<" DSML "tool_calls>\n"
    "<" DSML "invoke name=\"$TOOL_NAME\">\n"
    "<" DSML "parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE"
    "</" DSML "parameter>\n...\n</" DSML "invoke>\n"
    "<" DSML "invoke name=\"$TOOL_NAME2\">\n...\n</" DSML "invoke>\n" CALLS_END "\n\n"
    "String parameters should be specified as is and set `string=\"true\"`. For all other types "
    "(numbers, booleans, arrays, objects), pass the value in JSON format and set "
    "`string=\"false\"`.\n\n"
    "If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning "
    "inside <think>...</think> BEFORE any tool calls or final response.\n\n"
    "Otherwise, output directly after </think> with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n";
static const char tools_tail[] =
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool "
    "calls.\n";
static const char format_head[] =
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

// Appends the tools block for a list of OpenAI tools. An empty list gives nothing, and false.
static bool read_tools(Json *j, Str *out) {
    Str key = { 0 };
    size_t n = 0;
    for (json_array(j); json_item(j); n++) {
        bool found = false;
        str_puts(out, n ? "\n" : "\n\n");
        if (n == 0) str_puts(out, tools_head);
        for (json_object(j); json_member(j, &key);) {
            bool is_function = str_is(&key, "function") && !found;
            if (is_function && json_peek(j) != '{') json_expected(j, "a function object");
            if (is_function) found = json_dump(j, out);
            else json_skip(j);
        }
        if (!found) json_fail(j, "tool without a function");
    }
    if (n) str_puts(out, tools_tail);
    free(key.p);
    return n > 0;
}

static void add_param(Str *out, Span key, const char *is_string, Span value) {
    str_puts(out, "<" DSML "parameter name=\"");
    str_add(out, key.p, key.n);
    str_puts(out, "\" string=\"");
    str_puts(out, is_string);
    str_puts(out, "\">");
    str_add(out, value.p, value.n);
    str_puts(out, "</" DSML "parameter>");
}

// The arguments of a call as DSML parameters: strings as they are, other values as JSON. Text that
// is not JSON becomes one parameter, as the publisher's encoder does; a JSON non-object is refused.
static bool add_arguments(Span arguments, Str *out, Err *e) {
    Str clean = { 0 }, key = { 0 }, value = { 0 };      // clean: without duplicate keys
    Json j = json_open(arguments, "arguments", e);
    if (!json_dump(&j, &clean) || !json_end(&j)) {
        add_param(out, span_of("arguments"), "true", arguments);
        free(clean.p);
        return true;
    }
    j = json_open(str_span(&clean), "arguments", e);
    json_object(&j);
    for (int i = 0; json_member(&j, &key); i++) {
        bool is_string = json_peek(&j) == '"';
        value.n = 0;
        if (is_string) json_string(&j, &value);
        else json_dump(&j, &value);
        if (i) str_puts(out, "\n");
        add_param(out, str_span(&key), is_string ? "true" : "false", str_span(&value));
    }
    bool ok = json_end(&j);
    free(clean.p);
    free(key.p);
    free(value.p);
    return ok;
}

// Appends the calls block for a list of OpenAI tool calls and notes their ids.
static void read_calls(Json *j, Turn *t) {
    Str key = { 0 }, name = { 0 }, id = { 0 }, args = { 0 };
    int64_t n = 0;
    for (json_array(j); json_item(j); n++) {
        bool named = false, argued = false;
        args.n = id.n = 0;
        for (json_object(j); json_member(j, &key);) {
            if (str_is(&key, "id") && json_peek(j) == '"') json_string(j, &id);
            else if (!str_is(&key, "function")) json_skip(j);
            else for (json_object(j); json_member(j, &key);) {
                if (str_is(&key, "name")) named = json_string(j, &name);
                else if (!str_is(&key, "arguments")) json_skip(j);
                else if (json_peek(j) == '"') argued = json_string(j, &args);
                else args.n = 0, argued = json_dump(j, &args);
            }
        }
        if (!named || !argued) json_fail(j, "tool call without a name or arguments");
        if (j->bad) break;
        if (id.n) map_add(&t->calls, str_span(&id), n);
        if (id.n) map_find(&t->calls, str_span(&id))->value = n;
        str_puts(&t->extra, n ? "\n" : CALLS_START ">\n");
        str_puts(&t->extra, "<" DSML "invoke name=\"");
        str_add(&t->extra, name.p, name.n);
        str_puts(&t->extra, "\">\n");
        if (!add_arguments(str_span(&args), &t->extra, j->e)) j->bad = true;
        str_puts(&t->extra, "\n</" DSML "invoke>");
    }
    t->has_calls = n > 0;
    if (n) str_puts(&t->extra, "\n" CALLS_END);
    free(key.p);
    free(name.p);
    free(id.p);
    free(args.p);
}

// ROLE_..., or EFFORT_... by name; -1 and an error if there is none.
static int read_name(Json *j, const char *what, const char *const *names, int n) {
    Str s = { 0 };
    int i = 0;
    if (!json_string(j, &s)) i = n;
    while (i < n && !str_is(&s, names[i])) i++;
    if (i == n) json_fail(j, "unknown %s \"%.*s\"", what, SHOWN(s));
    free(s.p);
    return i < n ? i : -1;
}

// Turns to a value kept by json_raw; false if it is absent or null, or after an error.
static bool open_value(Json *in, const Json *j, Span raw) {
    if (in->bad || !raw.p) return false;
    *in = json_inside(j, raw);
    return !json_null(in);
}

static void add_response_format(Json *j, Str *out) {
    Str text = { 0 };
    if (json_dump(j, &text) && !str_is(&text, "{}")) {
        str_puts(out, "\n\n");
        str_puts(out, format_head);
        str_add(out, text.p, text.n);
    }
    free(text.p);
}

// One message object. On an error j->bad is set.
static void read_message(Chat *c, Json *j, bool context) {
    static const char *const tasks[] = { "action", "query", "authority", "domain", "title",
                                         "read_url" };
    static const char *const keys[] = { "role", "content", "reasoning_content", "tools",
                                        "response_format", "tool_calls", "tool_call_id", "task",
                                        "wo_eos" };
    enum { K_ROLE, K_CONTENT, K_REASONING, K_TOOLS, K_FORMAT, K_CALLS, K_ID, K_TASK, K_NO_EOS,
           N_KEYS };
    Span raw[N_KEYS] = { { 0 } };
    Str key = { 0 }, content = { 0 }, reasoning = { 0 }, unused = { 0 };
    for (json_object(j); json_member(j, &key);) {
        int k = 0;
        while (k < N_KEYS && !str_is(&key, keys[k])) k++;
        if (k < N_KEYS) json_raw(j, &raw[k]);
        else json_skip(j);
    }
    free(key.p);
    if (!raw[K_ROLE].p) json_fail(j, "message without a role");
    if (j->bad) return;
    Json in = json_inside(j, raw[K_ROLE]);
    int role = read_name(&in, "role", role_names, N_ROLES);
    bool assistant = role == ROLE_ASSISTANT, tool = role == ROLE_TOOL;
    bool user = tool || role == ROLE_USER;              // tools on these count for nothing
    bool has_extra = role == ROLE_SYSTEM || role == ROLE_DEVELOPER;
    if (open_value(&in, j, raw[K_CONTENT])) read_content(&in, tool, &content);
    if (assistant && open_value(&in, j, raw[K_REASONING])) json_string(&in, &reasoning);
    if (role == ROLE_DEVELOPER && !content.n) json_fail(&in, "developer message without content");
    if (!in.bad) {
        Turn *t = chat_say(c, (Role)role, str_span(&content), str_span(&reasoning), context);
        Str *extra = has_extra ? &t->extra : &unused;
        Block *block = &t->blocks[t->n_blocks - 1];
        if (!user && open_value(&in, j, raw[K_TOOLS])) t->has_tools |= read_tools(&in, extra);
        if (has_extra && open_value(&in, j, raw[K_FORMAT])) add_response_format(&in, extra);
        if (assistant && open_value(&in, j, raw[K_CALLS])) read_calls(&in, t);
        if (tool && open_value(&in, j, raw[K_ID])) json_string(&in, &block->id);
        if (open_value(&in, j, raw[K_NO_EOS])) json_bool(&in, &t->no_eos);
        if (t->n_blocks == 1 && open_value(&in, j, raw[K_TASK])) {
            int task = read_name(&in, "task", tasks, sizeof tasks / sizeof *tasks);
            if (task >= 0) snprintf(t->task, sizeof t->task, "<｜%s｜>", tasks[task]);
        }
    }
    j->bad = in.bad;
    free(content.p);
    free(reasoning.p);
    free(unused.p);
}

// The first system message, where tools and formats given apart from the messages go; a new one in
// front if there is none.
static Turn *system_turn(Chat *c) {
    for (size_t i = 0; i < c->n; i++)
        if (c->turns[i].role == ROLE_SYSTEM) return &c->turns[i];
    chat_say(c, ROLE_SYSTEM, span_of(""), span_of(""), c->n && c->turns[0].context);
    Turn t = c->turns[c->n - 1];
    memmove(c->turns + 1, c->turns, (c->n - 1) * sizeof t);
    c->turns[0] = t;
    return c->turns;
}

// Reads a list of messages, or an object with `messages` and perhaps `context` (messages already in
// the prompt), `tools`, `response_format`, `thinking`, `reasoning_effort`, `drop_thinking`,
// `add_bos`, `release` ("v4", "0731"). Appends to *c, sets what is given in *o. `name`: for errors.
bool chat_read(Chat *c, ChatOptions *o, Span text, const char *name, Err *e) {
    static const char *const releases[] = { "v4", "0731" };
    Json j = json_open(text, name, e), in = j;
    Span context = { 0 }, messages = { 0 }, tools = { 0 }, format = { 0 };
    Str key = { 0 };
    bool flag = false;
    if (json_peek(&j) == '[') json_raw(&j, &messages);
    else for (json_object(&j); json_member(&j, &key);) {
        Span k = str_span(&key);
        if (span_is(k, "messages")) json_raw(&j, &messages);
        else if (span_is(k, "context")) json_raw(&j, &context);
        else if (span_is(k, "tools")) json_raw(&j, &tools);
        else if (span_is(k, "response_format")) json_raw(&j, &format);
        else if (span_is(k, "thinking")) json_bool(&j, &o->thinking);
        else if (span_is(k, "release")) o->release_0731 = read_name(&j, key.p, releases, 2) == 1;
        else if (span_is(k, "reasoning_effort")) {
            int effort = json_null(&j) ? 0 : read_name(&j, key.p, effort_names, N_EFFORTS);
            o->effort = effort < 0 ? EFFORT_NONE : (Effort)effort;
        } else if (span_is(k, "drop_thinking")) o->keep_thinking = json_bool(&j, &flag) && !flag;
        else if (span_is(k, "add_bos")) o->no_bos = json_bool(&j, &flag) && !flag;
        else json_skip(&j);
    }
    free(key.p);
    if (json_end(&j) && !messages.p) json_fail(&j, "no messages");
    Span lists[] = { context, messages };
    in.bad = j.bad;
    for (int i = 0; i < 2; i++)
        if (open_value(&in, &j, lists[i]))
            for (json_array(&in); json_item(&in);) read_message(c, &in, i == 0);
    if (open_value(&in, &j, tools)) {
        Turn *t = system_turn(c);
        t->has_tools |= read_tools(&in, &t->extra);
    }
    if (open_value(&in, &j, format)) add_response_format(&in, &system_turn(c)->extra);
    return !in.bad;
}

// ---- messages -> prompt

static const char effort_x[] =
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n";
static const char effort_y[] =
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles "
    "and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n";

// The prefix of a generation and effort; NULL: the publisher's encoder refuses it.
static const char *effort_prefix(bool release_0731, Effort effort) {
    if (effort == EFFORT_MAX) return release_0731 ? effort_y : effort_x;
    if (effort == EFFORT_HIGH) return release_0731 ? effort_x : "";
    return effort == EFFORT_NONE || release_0731 ? "" : NULL;
}

typedef struct { int64_t place; size_t from; } Slot;
static int by_place(const void *a, const void *b) {
    const Slot *x = a, *y = b;
    return x->place != y->place ? (x->place > y->place) - (x->place < y->place) :
           (x->from > y->from) - (x->from < y->from);
}

// Puts the tool results of a turn into the order of the calls they answer; texts stay in place.
static void order_results(Turn *t, const Map *calls) {
    Slot *slots = xalloc(t->n_blocks, sizeof *slots);
    Block *old = xalloc(t->n_blocks, sizeof *old);
    size_t n = 0;
    memcpy(old, t->blocks, t->n_blocks * sizeof *old);
    for (size_t i = 0; i < t->n_blocks; i++) {
        const MapEntry *e = map_find(calls, str_span(&old[i].id));
        if (old[i].is_result) slots[n++] = (Slot){ e ? e->value : 0, i };
    }
    qsort(slots, n, sizeof *slots, by_place);
    for (size_t i = 0, k = 0; i < t->n_blocks; i++)
        if (old[i].is_result) t->blocks[i] = old[slots[k++].from];
    free(slots);
    free(old);
}

static void render_turn(const Turn *t, bool with_reasoning, Str *out) {
    bool user = t->role == ROLE_USER || t->role == ROLE_DEVELOPER;
    if (user) str_puts(out, "<｜User｜>");
    if (t->role == ROLE_REMINDER) str_puts(out, "<｜latest_reminder｜>");
    if (with_reasoning) {
        str_add(out, t->reasoning.p, t->reasoning.n);
        str_puts(out, "</think>");
    }
    for (size_t i = 0; i < t->n_blocks; i++) {
        const Block *b = &t->blocks[i];
        if (i && user) str_puts(out, "\n\n");
        if (b->is_result) str_puts(out, "<tool_result>");
        str_add(out, b->text.p, b->text.n);
        if (b->is_result) str_puts(out, "</tool_result>");
    }
    str_add(out, t->extra.p, t->extra.n);
    if (t->role == ROLE_ASSISTANT && !t->no_eos) str_puts(out, EOS_TEXT);
}

// Appends the prompt for a chat. Turns marked `context` are not written, but count for the others.
bool chat_render(Chat *c, const ChatOptions *o, Str *out, Err *e) {
    const char *prefix = effort_prefix(o->release_0731, o->effort);
    bool drop = !o->keep_thinking, context = c->n && c->turns[0].context;
    const Map *calls = NULL;
    size_t users = 0, n = 0;                            // users: past the last user's turn
    if (o->thinking && !prefix)
        return fail(e, "reasoning effort %s: the v4 encoding has none, high and max",
                    effort_names[o->effort]);
    for (size_t i = 0; i < c->n; i++) {
        Turn *t = &c->turns[i];
        if (t->has_tools) drop = false;
        if (t->role == ROLE_USER || t->role == ROLE_DEVELOPER) users = i + 1;
        if (t->has_calls) calls = &t->calls;
        if (t->role == ROLE_USER && calls && calls->n) order_results(t, calls);
    }
    size_t *kept = xalloc(c->n, sizeof *kept);          // old developer turns go with old reasoning
    for (size_t i = 0; i < c->n; i++)
        if (!(o->thinking && drop && i + 1 < users && c->turns[i].role == ROLE_DEVELOPER))
            kept[n++] = i;
    if (!o->no_bos && !context) str_puts(out, BOS_TEXT);
    if (o->thinking && n && !context) str_puts(out, prefix);
    for (size_t k = 0; k < n; k++) {
        const Turn *t = &c->turns[kept[k]], *before = k ? &c->turns[kept[k - 1]] : NULL;
        const Turn *next = k + 1 < n ? &c->turns[kept[k + 1]] : NULL;
        bool reasoning = o->thinking && t->role == ROLE_ASSISTANT && (!drop || kept[k] >= users);
        if (t->context) continue;
        render_turn(t, reasoning && !(before && before->task[0]), out);
        if (next && next->role != ROLE_ASSISTANT && next->role != ROLE_REMINDER) continue;
        bool action = !strcmp(t->task, "<｜action｜>");
        if (action || (!t->task[0] && (t->role == ROLE_USER || t->role == ROLE_DEVELOPER))) {
            bool think = o->thinking && (action || !drop || kept[k] + 1 >= users);
            str_puts(out, think ? "<｜Assistant｜><think>" : "<｜Assistant｜></think>");
        }
        str_puts(out, t->task);
    }
    free(kept);
    return true;
}

// ---- what the model writes


void reply_free(Reply *r) {
    for (size_t i = 0; i < r->n_calls; i++) {
        free(r->calls[i].name.p);
        free(r->calls[i].arguments.p);
    }
    free(r->calls);
    free(r->reasoning.p);
    free(r->content.p);
    *r = (Reply){ 0 };
}

static bool starts_with(Span s, const char *z) {
    size_t n = strlen(z);
    return s.n >= n && !memcmp(s.p, z, n);
}

static size_t find(Span s, const char *z) {             // SIZE_MAX: not there
    const char *at = s.n ? memmem(s.p, s.n, z, strlen(z)) : NULL;
    return at ? (size_t)(at - s.p) : SIZE_MAX;
}

static bool eat(Span *s, const char *z) {
    bool there = starts_with(*s, z);
    if (there) *s = span_from(*s, strlen(z));
    return there;
}

// What stands before the next `stop`; *s then begins behind it.
static bool take_until(Span *s, const char *stop, Span *before) {
    size_t at = find(*s, stop);
    if (at == SIZE_MAX) return false;
    *before = (Span){ s->p, at };
    *s = span_from(*s, at + strlen(stop));
    return true;
}

// `KEY" string="true|false">VALUE</...parameter>` and a newline: one more member of the arguments.
static bool parse_param(Span *s, Map *keys, Str *arguments, Err *e) {
    Span key, value, at = *s;
    bool is_string = false;
    bool ok = take_until(s, "\" string=\"", &key) &&
              ((is_string = eat(s, "true\">")) || eat(s, "false\">")) &&
              take_until(s, "</" DSML "parameter", &value) && eat(s, ">\n");
    if (!ok) return fail(e, "bad parameter \"%.*s\"", SHOWN(at));
    if (!map_add(keys, key, 0)) return fail(e, "parameter \"%.*s\" twice", SHOWN(key));
    if (keys->n > 1) str_puts(arguments, ", ");
    json_put_string(arguments, key);
    str_puts(arguments, ": ");
    if (is_string) json_put_string(arguments, value);
    else str_add(arguments, value.p, value.n);
    return true;
}

// The calls behind CALLS_START, up to and with CALLS_END.
static bool parse_calls(Span *s, Reply *r, Err *e) {
    bool ok = eat(s, ">\n");
    while (ok && !eat(s, CALLS_END)) {
        Span at = *s, name;
        ok = eat(s, "<" DSML "invoke name=\"") && take_until(s, "\">\n", &name);
        if (!ok) return fail(e, "bad tool call \"%.*s\"", SHOWN(at));
        eat(s, "\n");                       // without parameters there is an empty line
        r->calls = grow(r->calls, r->n_calls, sizeof *r->calls);
        Call *call = &r->calls[r->n_calls++];
        Map keys = { 0 };
        str_add(&call->name, name.p, name.n);
        str_puts(&call->arguments, "{");
        while (ok && eat(s, "<" DSML "parameter name=\""))
            ok = parse_param(s, &keys, &call->arguments, e);
        str_puts(&call->arguments, "}");
        map_free(&keys);
        if (!ok) return false;
        at = *s;
        if (!eat(s, "</" DSML "invoke>\n"))
            return fail(e, "unfinished tool call \"%.*s\"", SHOWN(at));
    }
    return ok || fail(e, "bad tool calls \"%.*s\"", SHOWN(*s));
}

// The publisher's strict reading of a whole completion that ends with EOS as text: no repairs.
// *r must be { 0 }; reply_free it in any case.
bool reply_parse(Span s, bool thinking, Reply *r, Err *e) {
    static const char *const never[] = { BOS_TEXT, EOS_TEXT, "<think>", "</think>", DSML };
    Span part;
    if (thinking) {
        if (!take_until(&s, "</think>", &part) || find(part, CALLS_START) != SIZE_MAX)
            return fail(e, "missing </think>");
        str_add(&r->reasoning, part.p, part.n);
    }
    bool calls = find(s, CALLS_START) < find(s, EOS_TEXT);
    if (!take_until(&s, calls ? CALLS_START : EOS_TEXT, &part)) return fail(e, "missing " EOS_TEXT);
    str_add(&r->content, part.p, part.n);
    if (calls && !parse_calls(&s, r, e)) return false;
    if (calls) eat(&s, EOS_TEXT);
    if (s.n) return fail(e, "text behind the end: \"%.*s\"", SHOWN(s));
    for (size_t i = 0; i < sizeof never / sizeof *never; i++)
        if (find(str_span(&r->reasoning), never[i]) != SIZE_MAX ||
            find(str_span(&r->content), never[i]) != SIZE_MAX)
            return fail(e, "unexpected %s in the text", never[i]);
    return true;
}


void reader_free(Reader *r) {
    free(r->held.p);
    free(r->call.name.p);
    free(r->call.arguments.p);
    map_free(&r->keys);
    *r = (Reader){ 0 };
}

static void tell(Reader *r, Event kind, Span text) {
    if (text.n) r->on_event(r->arg, kind, text, span_of(""));
}

// How many bytes at the end of s may be the beginning of tag.
static size_t tag_begun(Span s, const char *tag) {
    size_t k = strlen(tag) - 1;
    if (k > s.n) k = s.n;
    while (k && memcmp(s.p + s.n - k, tag, k)) k--;
    return k;
}

// Which DSML tag s begins with, after white space: its index, -1 none, -2 not known yet.
enum { TAG_CALLS, TAG_INVOKE, TAG_PARAM };
static const char *const dsml_words[] = { "tool_calls", "invoke", "parameter" };
static int dsml_word(Span s) {
    int undecided = -1;
    while (s.n && (s.p[0] == ' ' || s.p[0] == '\n')) s = span_from(s, 1);
    for (int i = 0; i < 3; i++) {
        if (starts_with(s, dsml_words[i])) return i;
        if (s.n < strlen(dsml_words[i]) && !memcmp(s.p, dsml_words[i], s.n)) undecided = -2;
    }
    return undecided;
}

static void end_call(Reader *r) {
    if (r->open) {
        str_puts(&r->call.arguments, "}");
        r->on_event(r->arg, EV_CALL, str_span(&r->call.name), str_span(&r->call.arguments));
    }
    r->open = false;
    r->call.name.n = r->call.arguments.n = 0;
    map_free(&r->keys);
}

// A value that should be JSON and is not stays a string.
static void add_value(Reader *r, Span key, bool is_string, Span value) {
    Err unused;
    if (!r->open || !map_add(&r->keys, key, 0)) return;
    if (r->keys.n > 1) str_puts(&r->call.arguments, ", ");
    json_put_string(&r->call.arguments, key);
    str_puts(&r->call.arguments, ": ");
    Json j = json_open(value, "value", &unused);
    if (!is_string && json_skip(&j) && json_end(&j)) str_add(&r->call.arguments, value.p, value.n);
    else json_put_string(&r->call.arguments, value);
}

static Span attribute(Span tag, const char *start) {    // NAME="value"
    Span value = span_of("");
    if (take_until(&tag, start, &value) && !take_until(&tag, "\"", &value)) value = tag;
    return value;
}

// Each of these looks at the held text, acts, and returns how much is done with; 0: more is needed.
static size_t read_reasoning(Reader *r, Span s) {
    size_t at = find(s, "</think>");
    bool found = at != SIZE_MAX;
    if (!found) at = s.n - tag_begun(s, "</think>");
    tell(r, EV_REASONING, (Span){ s.p, at });
    if (found) r->state = IN_CONTENT;
    return found ? at + strlen("</think>") : at;
}

static size_t read_content_text(Reader *r, Span s) {
    size_t at = find(s, "<" DSML), newlines = 0;
    int word = -1;
    if (at == SIZE_MAX) {
        size_t a = tag_begun(s, "\n\n<" DSML), b = tag_begun(s, "<" DSML);
        at = s.n - (a > b ? a : b);
    } else {
        Span rest = span_from(s, at + strlen("<" DSML));
        word = dsml_word(rest);
        if (word == -1 || word == TAG_PARAM) {
            at = s.n - rest.n;                          // not a tag of ours: text
            word = -1;
        } else if (at >= 2 && !memcmp(s.p + at - 2, "\n\n", 2)) newlines = 2;
    }
    tell(r, EV_CONTENT, (Span){ s.p, at - newlines });
    if (word >= 0) r->state = IN_CALLS;
    return word >= 0 ? at : at - newlines;
}

static size_t read_calls_tag(Reader *r, Span s) {
    size_t start = find(s, "<"), end = find(s, ">"), at = 0;
    if (start) return start == SIZE_MAX ? s.n : start;  // between tags nothing counts
    if (end == SIZE_MAX) return 0;
    Span tag = { s.p + 1, end - 1 }, rest = span_from(s, end + 1);
    bool closing = eat(&tag, "/"), empty = tag.n && tag.p[tag.n - 1] == '/';
    int word = eat(&tag, DSML) ? dsml_word(tag) : -1;
    if (word == TAG_PARAM && !closing) {
        int next = -1;
        while (!empty && next < 0) {                    // the value ends at our next closing tag
            size_t n = find(span_from(rest, at), "</" DSML);
            if (n == SIZE_MAX) return 0;
            next = dsml_word(span_from(rest, at + n + strlen("</" DSML)));
            if (next == -2) return 0;
            at += next < 0 ? n + 1 : n;
        }
        bool is_string = !span_is(attribute(tag, "string=\""), "false");
        add_value(r, attribute(tag, "name=\""), is_string, (Span){ rest.p, at });
    } else if (word == TAG_CALLS || word == TAG_INVOKE) {
        end_call(r);
        if (word == TAG_CALLS && closing) r->state = IN_CONTENT;
        if (word == TAG_INVOKE && !closing) {
            Span name = attribute(tag, "name=\"");
            str_add(&r->call.name, name.p, name.n);
            str_puts(&r->call.arguments, "{");
            r->open = true;
            if (empty) end_call(r);
        }
    }
    return end + 1 + at;
}

// Takes the next piece of text: whole characters, as tok_decode gives them.
void reader_feed(Reader *r, Span piece) {
    size_t done = 0, n = 1;
    int state = -1;
    str_add(&r->held, piece.p, piece.n);
    while (done < r->held.n && (n || (int)r->state != state)) {
        Span s = span_from(str_span(&r->held), done);
        state = (int)r->state;
        n = state == IN_REASONING ? read_reasoning(r, s) :
            state == IN_CONTENT ? read_content_text(r, s) : read_calls_tag(r, s);
        done += n;
    }
    memmove(r->held.p, r->held.p + done, r->held.n -= done);
}

// The end of the completion: what was held back is text. False if it broke off inside the tool
// calls; an unfinished call is not told.
bool reader_finish(Reader *r) {
    if (r->state != IN_CALLS)
        tell(r, r->state == IN_REASONING ? EV_REASONING : EV_CONTENT, str_span(&r->held));
    r->held.n = 0;
    return r->state != IN_CALLS;
}
