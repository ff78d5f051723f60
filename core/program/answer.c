#include "answer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 256, ROUNDS = 16, ENOUGH = 64 };  // ids read at a time; rounds of a call; bytes of a message

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static offramp_status no_memory(offramp_error *error) {
    if (error) snprintf(error->message, sizeof error->message, "There is no memory for the answer.");
    return OFFRAMP_NO_MEMORY;
}

// Text --------------------------------------------------------------------------------------------

// How many bytes at the end of a text begin a character that is not complete.
static int64_t unfinished(const char *text, int64_t length) {
    for (int64_t back = 1; back <= 3 && back <= length; back++) {
        const unsigned char c = (unsigned char)text[length - back];
        if (c < 0x80) return 0;
        if (c >= 0xc0) return back < (c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2) ? back : 0;
    }
    return 0;
}

// A token's text: what it completes, and with the last token all that is left.
static offramp_status add_text(const Settings *s, Answer *a, Token *token, int64_t *held, int last) {
    int64_t length;
    int special;
    const char *bytes = offramp_token(s->model, token->d.id, &length, &special);
    if (special) length = 0;
    char *longer = realloc(a->text, a->length + *held + length + 1);
    if (!longer) return OFFRAMP_NO_MEMORY;
    a->text = longer;
    memcpy(a->text + a->length + *held, bytes, length);
    const int64_t all = *held + length;
    *held = last ? 0 : unfinished(a->text + a->length, all);
    token->begin = a->length, token->length = all - *held;
    a->length += token->length;
    return OFFRAMP_OK;
}

// Decoding ----------------------------------------------------------------------------------------

// Makes room for a text of so many ids, and forgets what the text knows if these ids do not begin with it.
static offramp_status begin(const Settings *s, Text *x, const int64_t *ids, int64_t count,
                            offramp_error *error) {
    const int64_t room = count + s->most + 1;
    int goes_on = x->session && x->run < count && !memcmp(x->ids, ids, x->run * sizeof *ids);
    if (!goes_on) {
        offramp_session_free(x->session);
        x->session = offramp_file_session(s->model, room, error), x->run = 0;
        if (!x->session) return OFFRAMP_NO_MEMORY;
    }
    if (x->room < room) {
        int64_t *longer = realloc(x->ids, room * sizeof *longer);
        if (!longer) return no_memory(error);
        x->ids = longer, x->room = room;
    }
    if (!x->deep) x->deep = malloc(2 * offramp_model_hidden(offramp_file_model(s->model)) * sizeof *x->deep);
    if (!x->deep) return no_memory(error);
    if (!goes_on)
        memset(x->deep, 0, 2 * offramp_model_hidden(offramp_file_model(s->model)) * sizeof *x->deep);
    memcpy(x->ids, ids, count * sizeof *ids), x->known = count;
    return OFFRAMP_OK;
}

static offramp_status step(const Settings *s, offramp_request *r, offramp_error *error) {
    offramp_request *const requests[] = {r};
    const offramp_status status = offramp_step(s->plan, requests, 1, ROUNDS, NULL, error);
    if (status || !r->failed) return status;
    if (error)
        snprintf(error->message, sizeof error->message,
                 "The model's numbers are not finite: is the file damaged?");
    return OFFRAMP_INVALID;
}

// Reads the prompt, but for its last token.
static offramp_status read_prompt(const Settings *s, Text *x, offramp_request *r, offramp_error *error) {
    while (x->run < x->known - 1 && !*s->stop) {
        const int64_t left = x->known - 1 - x->run;
        r->reads = left < PIECE ? left : PIECE;
        const offramp_status status = step(s, r, error);
        if (status) return status;
        x->run = r->run;
    }
    r->reads = 0;
    return OFFRAMP_OK;
}

// Takes the decisions of a step into the answer.
static offramp_status take(const Settings *s, Answer *a, const offramp_request *r, int64_t *held,
                           void (*shows)(const Answer *, const Token *)) {
    const int64_t passes = a->count ? a->tokens[a->count - 1].passes : 0,
                  rejected = a->count ? a->tokens[a->count - 1].rejected : 0;
    for (int64_t i = 0; i < r->decided && !a->ended; i++) {
        Token *token = a->tokens + a->count;
        const offramp_decision d = r->decisions[i];
        *token = (Token){.d = d, .passes = passes + d.passes, .rejected = rejected + d.rejected};
        if (__builtin_add_overflow(d.flops, a->count ? token[-1].cumulative : 0, &token->cumulative))
            token->cumulative = INT64_MAX;
        for (int64_t e = 0; e < r->ends_count; e++) a->ended |= d.id == r->ends[e];
        a->count++;
        if (add_text(s, a, token, held, a->ended || a->count == a->most)) return OFFRAMP_NO_MEMORY;
        if (shows) shows(a, token);
    }
    return OFFRAMP_OK;
}

static offramp_status decode(const Settings *s, Text *x, offramp_request *r,
                             void (*shows)(const Answer *, const Token *), Answer *a, offramp_error *error) {
    int64_t held = 0;
    const int64_t left = offramp_file_context(s->model) - x->known, most = left < s->most ? left : s->most;
    a->most = most;
    a->tokens = malloc((most + 1) * sizeof *a->tokens),
    r->decisions = malloc((most + 1) * sizeof *r->decisions);
    offramp_status status = a->tokens && r->decisions ? OFFRAMP_OK : no_memory(error);
    while (!status && a->count < most && !a->ended && !*s->stop) {
        r->known = x->known, r->run = x->run, r->most = most - a->count;
        status = step(s, r, error);
        if (!status && take(s, a, r, &held, shows)) status = no_memory(error);
        x->known += r->decided, x->run = r->run;
    }
    free(r->decisions);
    return status;
}

offramp_status answer(const Settings *s, Text *x, const int64_t *ids, int64_t count,
                      void (*shows)(const Answer *, const Token *), Answer *a, offramp_error *error) {
    *a = (Answer){.prompt = count};
    const double started = now();
    offramp_status status = begin(s, x, ids, count, error);
    if (status) return status;
    offramp_request r = {.session = x->session,
                         .ids = x->ids,
                         .known = count,
                         .prompt = count,
                         .run = x->run,
                         .how = s->how,
                         .deep = x->deep};
    r.ends = offramp_file_ends(s->model, &r.ends_count);
    status = read_prompt(s, x, &r, error);
    const double read = now();
    if (!status) status = decode(s, x, &r, shows, a, error);
    a->prefill = read - started, a->decode = now() - read;
    return status;
}

void free_text(Text *x) {
    offramp_session_free(x->session);
    free(x->ids), free(x->deep);
    *x = (Text){0};
}

void free_answer(Answer *a) {
    free(a->tokens), free(a->text);
    *a = (Answer){0};
}

// Printing ----------------------------------------------------------------------------------------

// Whether a terminal obeys the character at `text` (of `n` bytes) instead of showing it: controls but for a tab and
// a new line, and those that turn the direction of text.
static int is_control(const char *text, int64_t n) {
    const unsigned char *c = (const unsigned char *)text;
    if (n == 1) return (c[0] < 0x20 && c[0] != '\n' && c[0] != '\t') || c[0] == 0x7f;
    if (n == 2) return c[0] == 0xc2 && c[1] < 0xa0;
    return n == 3 && c[0] == 0xe2 &&
           ((c[1] == 0x80 && c[2] >= 0xaa && c[2] <= 0xae) || (c[1] == 0x81 && c[2] >= 0xa6 && c[2] <= 0xa9));
}

void print_shown(FILE *out, const char *text, int64_t length) {
    const int terminal = isatty(fileno(out));
    for (int64_t i = 0, n; terminal && i < length; i += n) {
        n = offramp_character(text + i, length - i);
        const int hidden = n < 0 || is_control(text + i, n);
        n = n < 0 ? -n : n;
        fwrite(hidden ? "\xef\xbf\xbd" : text + i, 1, hidden ? 3 : n, out);
    }
    if (!terminal) fwrite(text, 1, length, out);
}

// JSON --------------------------------------------------------------------------------------------

// A text in quotation marks. What is not UTF-8 becomes U+FFFD.
static void print_text(FILE *out, const char *text, int64_t length) {
    fputc('"', out);
    for (int64_t i = 0, n; i < length; i += n) {
        const unsigned char c = (unsigned char)text[i];
        n = offramp_character(text + i, length - i);
        if (n < 0)
            n = -n, fputs("\\ufffd", out);
        else if (c == '"' || c == '\\')
            fprintf(out, "\\%c", c);
        else if (c < 0x20 || c == 0x7f)
            fprintf(out, "\\u%04x", c);
        else if (is_control(text + i, n))
            fprintf(out, "\\u%04x",
                    n == 2 ? (unsigned char)text[i + 1]
                           : 0x2000 + (text[i + 1] & 0x3f) * 64 + (text[i + 2] & 0x3f));
        else
            fwrite(text + i, 1, n, out);
    }
    fputc('"', out);
}

static void print_number(FILE *out, double value) {
    if (isfinite(value))
        fprintf(out, "%.17g", value);
    else
        fputs("null", out);
}

static void print_token(FILE *out, const Settings *s, const Answer *a, const Token *t) {
    static const char *const sources[] = {"full", "exit", "text", "table"};
    const int drafts = s->number >= 0 && strncmp(s->mode, "early", 5);
    fprintf(out, "{\"id\": %lld, \"text\": ", (long long)t->d.id);
    print_text(out, a->text + t->begin, t->length);
    fprintf(out, ", \"exit_block\": %lld, \"blocks\": %lld, \"confidence\": ", (long long)t->d.block,
            (long long)t->d.blocks);
    print_number(out, t->d.confidence);
    fprintf(out, ", \"flops\": %lld, \"cumulative_flops\": %lld, \"deep_passes\": %lld, \"rejected\": %lld, ",
            (long long)t->d.flops, (long long)t->cumulative, (long long)t->passes, (long long)t->rejected);
    fprintf(out, "\"source\": \"%s\", \"drafted\": %s}", sources[t->d.source],
            drafts && t->d.source != OFFRAMP_FROM_FULL ? "true" : "false");
}

// FLOPs of full depth for the same tokens; 0 if the model's file does not say what blocks cost.
static double full_flops(const Settings *s, const Answer *a) {
    const int64_t blocks = offramp_file_count(s->model, "offramp.costs.flops");
    double fixed = offramp_file_number(s->model, "offramp.head_flops", 0, 0), seen = 0, sum = 0;
    for (int64_t i = 0; i < blocks; i++) {
        fixed += offramp_file_number(s->model, "offramp.costs.flops", i, 0);
        seen += offramp_file_number(s->model, "offramp.costs.seen_flops", i, 0);
    }
    for (int64_t i = 0; i < a->count; i++) sum += fixed + seen * (double)(a->prompt + i);
    return sum;
}

static void print_mode_text(FILE *out, const Settings *s, const char *name, const char *otherwise) {
    char key[ENOUGH];
    int64_t length;
    snprintf(key, sizeof key, "offramp.mode.%lld.%s", (long long)s->number, name);
    const char *text = s->number < 0 ? NULL : offramp_file_text(s->exits, key, &length);
    if (text)
        print_text(out, text, length);
    else
        print_text(out, otherwise, (int64_t)strlen(otherwise));
}

static void print_thresholds(FILE *out, const Settings *s) {
    char key[ENOUGH], values[ENOUGH];
    snprintf(key, sizeof key, "offramp.mode.%lld.blocks", (long long)s->number);
    snprintf(values, sizeof values, "offramp.mode.%lld.thresholds", (long long)s->number);
    fputc('{', out);
    for (int64_t i = 0; s->number >= 0 && i < offramp_file_count(s->exits, key); i++) {
        fprintf(out, "%s\"%.0f\": ", i ? ", " : "", offramp_file_number(s->exits, key, i, 0));
        print_number(out, offramp_file_number(s->exits, values, i, 1));
    }
    fputc('}', out);
}

void print_json(FILE *out, const Settings *s, const char *prompt, const Answer *a) {
    const Token *last = a->count ? a->tokens + a->count - 1 : NULL;
    const double full = full_flops(s, a), count = (double)a->count;
    double blocks = 0, stood = 0;
    for (int64_t i = 0; i < a->count; i++)
        blocks += (double)a->tokens[i].d.blocks, stood += a->tokens[i].d.source != OFFRAMP_FROM_FULL;
    const double drafted = stood + (last ? (double)last->rejected : 0);
    const int drafts = s->number >= 0 && strncmp(s->mode, "early", 5);
    fputc('{', out);
    if (prompt)
        fputs("\"prompt\": ", out), print_text(out, prompt, (int64_t)strlen(prompt)), fputs(", ", out);
    fputs("\"text\": ", out), print_text(out, a->text ? a->text : "", a->length);
    fputs(", \"tokens\": [", out);
    for (int64_t i = 0; i < a->count; i++) {
        if (i) fputs(", ", out);
        print_token(out, s, a, a->tokens + i);
    }
    fprintf(out, "], \"blocks\": %lld, \"mean_blocks\": ",
            (long long)offramp_model_blocks(offramp_file_model(s->model)));
    print_number(out, blocks / count);
    fputs(", \"flops_saved\": ", out);
    print_number(out, full > 0 && last ? 1 - (double)last->cumulative / full : NAN);
    fputs(", \"tokens_per_deep_pass\": ", out);
    print_number(out, last ? count / (double)(last->passes > 1 ? last->passes : 1) : NAN);
    fputs(", \"acceptance_rate\": ", out);
    print_number(out, drafts && drafted > 0 ? 1 - (double)last->rejected / drafted : NAN);
    fputs(", \"prefill_seconds\": ", out), print_number(out, a->prefill);
    fputs(", \"decode_tokens_per_second\": ", out), print_number(out, count / a->decode);
    const int early = !strncmp(s->mode, "early", 5);  // its points have no name of their own
    fputs(", \"mode\": ", out), print_text(out, s->mode, early ? 5 : (int64_t)strlen(s->mode));
    fputs(", \"fill\": ", out), print_mode_text(out, s, "fill_name", "project");
    fputs(", \"thresholds\": ", out), print_thresholds(out, s);
    fputs(", \"policy\": ", out), print_mode_text(out, s, "policy", "gate, ");
    fprintf(out, ", \"finish_reason\": \"%s\"}\n", a->ended ? "stop" : "length");
    fflush(out);
}
