// offramp-run: answers prompts by a GGUF file, without Python. `offramp-run --help` says how.

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answer.h"

enum { FINE, FAILED, WRONG };  // exit codes: all went well; a file or an answer failed; wrong arguments

static const char HELP[] =
    "usage: offramp-run MODEL.gguf [PROMPT] [options]\n"
    "\n"
    "Answers a prompt by a language model in a GGUF file. Without a prompt, each line from a pipe is one, "
    "and on a\n"
    "terminal you talk: an empty line ends the talk, Ctrl-C an answer.\n"
    "\n"
    "  --exits FILE         exits, as `offramp export MODEL --gguf DIR` writes them: exits.gguf\n"
    "  --mode MODE          full, exact or early, perhaps with a point: early:3 (default: exact with exits, "
    "else "
    "full)\n"
    "  --max-tokens N       longest answer, in tokens (default: 128)\n"
    "  --temperature T      0 takes the most probable token; above 0, tokens are drawn (default: 0)\n"
    "  --seed N             seed of the draws (default: 0)\n"
    "  --threads N          (default: one for each processor)\n"
    "  --raw                give the prompt as it is, without the model's chat template\n"
    "  --json               print a JSON object for each answer, as `offramp generate --json` does\n"
    "  --version            print the version, and what the program was compiled for\n"
    "  --help               print this\n"
    "\n"
    "Exit codes: 0, all went well; 1, a file or an answer failed; 2, wrong arguments.\n";

typedef struct {
    const char *model, *prompt, *exits, *mode;
    long tokens, threads;
    unsigned long seed;
    double temperature;
    int raw, json;
} Options;

static volatile sig_atomic_t stop;
static void on_interrupt(int signal) {
    (void)signal;
    stop = 1;
}

// A file that a stranger made shorter ends the program at a page that is no more there, with a sentence.
static void on_lost_page(int signal) {
    static const char sentence[] = "offramp-run: A file of the model became shorter while it was used.\n";
    (void)signal;
    if (write(STDERR_FILENO, sentence, sizeof sentence - 1)) _exit(FAILED);
    _exit(FAILED);
}

static int complain(int code, const char *sentence, const char *hint) {
    fputs("offramp-run: ", stderr);
    print_shown(stderr, sentence, (int64_t)strlen(sentence));
    fprintf(stderr, "%s%s\n", *hint ? "\n" : "", hint);
    return code;
}

// Options -----------------------------------------------------------------------------------------

static int number_in(const char *text, double least, double most, double *value) {
    char *end;
    errno = 0;
    *value = strtod(text, &end);
    return *text && !*end && !errno && *value >= least && *value <= most;
}

static int whole_in(const char *text, double least, double most, long *value) {
    double number;
    if (!number_in(text, least, most, &number) || number != floor(number)) return 0;
    *value = (long)number;
    return 1;
}

enum { EXITS = 1, MODE, TOKENS, TEMPERATURE, SEED, THREADS, RAW, JSON, VERSION, HELP_ };
static const struct option NAMES[] = {{"exits", 1, NULL, EXITS},
                                      {"mode", 1, NULL, MODE},
                                      {"max-tokens", 1, NULL, TOKENS},
                                      {"temperature", 1, NULL, TEMPERATURE},
                                      {"seed", 1, NULL, SEED},
                                      {"threads", 1, NULL, THREADS},
                                      {"raw", 0, NULL, RAW},
                                      {"json", 0, NULL, JSON},
                                      {"version", 0, NULL, VERSION},
                                      {"help", 0, NULL, HELP_},
                                      {NULL, 0, NULL, 0}};

// Takes an option. 0 if its value is wrong.
static int take_option(Options *o, int name, const char *value) {
    long seed;
    switch (name) {
        case EXITS: o->exits = value; return 1;
        case MODE: o->mode = value; return 1;
        case TOKENS: return whole_in(value, 1, 1 << 20, &o->tokens);
        case TEMPERATURE: return number_in(value, 0, 1e6, &o->temperature);
        case THREADS: return whole_in(value, 1, OFFRAMP_MOST_THREADS, &o->threads);
        case SEED:
            if (!whole_in(value, 0, 0x1p53, &seed)) return 0;
            o->seed = (unsigned long)seed;
            return 1;
        case RAW: o->raw = 1; return 1;
        default: o->json = 1; return 1;
    }
}

// Reads the options. Returns -1, or the exit code of a program that has nothing more to do.
static int read_options(Options *o, int count, char **words) {
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    *o = (Options){.tokens = 128, .threads = processors < 1 ? 1 : processors};
    if (o->threads > OFFRAMP_MOST_THREADS) o->threads = OFFRAMP_MOST_THREADS;
    for (int name; (name = getopt_long(count, words, "", NAMES, NULL)) != -1;) {
        if (name == '?') return complain(WRONG, "see above.", "offramp-run --help lists the options.");
        if (name == HELP_) return fputs(HELP, stdout), FINE;
        if (name == VERSION)
            return printf("offramp-run, interface %lld, C code %s, %s\n", (long long)offramp_version(),
                          offramp_sources(), offramp_kernels()),
                   FINE;
        if (!take_option(o, name, optarg)) {
            fprintf(stderr, "offramp-run: '%.40s' is no value for --%s.\n", optarg, NAMES[name - 1].name);
            return WRONG;
        }
    }
    if (optind < count) o->model = words[optind++];
    if (optind < count) o->prompt = words[optind++];
    if (!o->model)
        return complain(WRONG, "Name a model's GGUF file.", "offramp-run --help lists the options.");
    if (optind < count)
        return complain(WRONG, "There is more than one prompt.", "Put it in quotation marks.");
    return -1;
}

// Prompts -----------------------------------------------------------------------------------------

// A talk: what was said, and the text as tokens.
typedef struct {
    offramp_message *messages;
    int64_t count, room;
    Text text;
} Talk;

static int add_message(Talk *talk, int64_t role, const char *said, int64_t length) {
    if (talk->count == talk->room) {
        talk->room = 2 * talk->room + 8;
        offramp_message *longer = realloc(talk->messages, talk->room * sizeof *longer);
        if (!longer) return 0;
        talk->messages = longer;
    }
    char *copy = malloc(length + 1);
    if (!copy) return 0;
    memcpy(copy, said, length), copy[length] = 0;
    talk->messages[talk->count++] = (offramp_message){role, copy};
    return 1;
}

static void free_talk(Talk *talk) {
    for (int64_t i = 0; i < talk->count; i++) free((char *)talk->messages[i].text);
    free(talk->messages), free_text(&talk->text);
    *talk = (Talk){0};
}

// A talk's ids by the model's chat template, or those of its messages in lines. Returns how many there are, of
// which `room` are written; -1 if there is no memory.
static int64_t tokens_of(const Settings *s, const Talk *talk, int raw, int64_t *ids, int64_t room) {
    if (!raw) return offramp_chat(s->model, talk->messages, talk->count, ids, room);
    int64_t length = 0;
    for (int64_t i = 0; i < talk->count; i++) length += 1 + (int64_t)strlen(talk->messages[i].text);
    char *text = malloc(length + 1), *to = text;
    for (int64_t i = 0; text && i < talk->count; i++) {
        const size_t own = strlen(talk->messages[i].text);
        if (i) *to++ = '\n';
        memcpy(to, talk->messages[i].text, own), to += own;
    }
    const int64_t count = text ? offramp_tokenise(s->model, text, to - text, 1, ids, room) : -1;
    free(text);
    return count;
}

// The ids of a talk. NULL, with a sentence, if there are none.
static int64_t *ids_of(const Settings *s, const Talk *talk, int raw, int64_t *count, offramp_error *error) {
    *count = tokens_of(s, talk, raw, NULL, 0);
    int64_t *ids = *count < 0 ? NULL : malloc((*count + 1) * sizeof *ids);
    if (ids) tokens_of(s, talk, raw, ids, *count);
    if (!ids) snprintf(error->message, sizeof error->message, "There is no memory for the prompt.");
    if (ids && (*count < 1 || *count >= offramp_file_context(s->model))) {
        snprintf(error->message, sizeof error->message,
                 "The prompt is %lld tokens long; the model holds %lld with its answer.", (long long)*count,
                 (long long)offramp_file_context(s->model));
        free(ids);
        return NULL;
    }
    return ids;
}

static int colours;  // whether tokens are shaded by where they came from

static void show(const Answer *answer, const Token *token) {
    static const char *const shades[] = {"", "\33[32m", "\33[36m",
                                         "\33[36m"};  // green: an exit; cyan: a look-up
    const char *shade = colours ? shades[token->d.source] : "";
    fputs(shade, stdout);
    print_shown(stdout, answer->text + token->begin, token->length);
    fputs(*shade ? "\33[0m" : "", stdout);
    fflush(stdout);
}

// Answers the talk's last message, and prints the answer. Returns an exit code.
static int answer_talk(const Settings *s, const Options *o, Talk *talk, int names) {
    offramp_error error;
    Answer made = {0};
    int64_t count;
    const char *prompt = talk->messages[talk->count - 1].text;
    int64_t *ids = ids_of(s, talk, o->raw, &count, &error);
    offramp_status status = ids ? OFFRAMP_OK : OFFRAMP_INVALID;
    stop = 0;
    if (!status) status = answer(s, &talk->text, ids, count, o->json ? NULL : show, &made, &error);
    free(ids);
    if (!status && o->json) print_json(stdout, s, names ? prompt : NULL, &made);
    if (!status && !o->json) puts(""), fflush(stdout);
    const int kept = status || add_message(talk, OFFRAMP_ASSISTANT, made.text ? made.text : "", made.length);
    free_answer(&made);
    if (status) return complain(FAILED, error.message, "");
    return kept ? FINE : complain(FAILED, "There is no memory for the talk.", "");
}

static int is_blank(const char *text) { return !text[strspn(text, " \t\n\v\f\r")]; }

// Answers one prompt in a talk of its own.
static int answer_prompt(const Settings *s, const Options *o, const char *prompt, int64_t length, int names) {
    Talk talk = {0};
    if (is_blank(prompt)) return complain(WRONG, "The prompt is empty.", "Give some text to go on from.");
    int code = add_message(&talk, OFFRAMP_USER, prompt, length)
                   ? answer_talk(s, o, &talk, names)
                   : complain(FAILED, "There is no memory for the prompt.", "");
    free_talk(&talk);
    return code;
}

// Reads lines from stdin: a talk on a terminal, else a prompt in each line.
static int answer_lines(const Settings *s, const Options *o, int talks) {
    Talk talk = {0};
    char *line = NULL;
    size_t room = 0;
    int code = FINE;
    while (code == FINE) {
        if (talks) printf("you> "), fflush(stdout);
        const ssize_t read = getline(&line, &room, stdin);
        if (read < 0 || (talks && is_blank(line))) break;
        const int64_t length = read && line[read - 1] == '\n' ? read - 1 : read;
        line[length] = 0;
        if (is_blank(line)) continue;
        if (!talks)
            code = answer_prompt(s, o, line, length, 1);
        else if (add_message(&talk, OFFRAMP_USER, line, length))
            code = answer_talk(s, o, &talk, 1);
    }
    if (talks) puts("");
    free(line), free_talk(&talk);
    return code;
}

// The program -------------------------------------------------------------------------------------

static void note(void *context, const char *sentence) {
    (void)context;
    fprintf(stderr, "offramp-run: note: %s\n", sentence);
}

static int run(Options *o, Settings *s, offramp_file **files) {
    offramp_error error;
    files[0] = offramp_file_new(o->model, note, NULL, &error);
    if (files[0] && !offramp_file_model(files[0]))
        return complain(FAILED, "The first file holds exits, and no model.",
                        "Name the model first: --exits FILE");
    if (files[0] && o->exits) files[1] = offramp_file_new(o->exits, note, NULL, &error);
    if (!files[0] || (o->exits && !files[1])) return complain(FAILED, error.message, "");
    s->model = files[0], s->exits = files[1];
    s->mode = o->mode ? o->mode : o->exits ? "exact" : "full";
    s->number = s->exits ? offramp_file_mode(s->exits, s->mode) : -1;
    s->plan = offramp_file_plan(s->model, s->exits, s->mode, &error);
    if (!s->plan || offramp_model_threads(offramp_file_model(s->model), o->threads, &error))
        return complain(FAILED, error.message, "");
    o->raw |= offramp_chat(s->model, &(offramp_message){OFFRAMP_USER, ""}, 1, NULL, 0) < 0;
    if (o->prompt) return answer_prompt(s, o, o->prompt, (int64_t)strlen(o->prompt), 0);
    return answer_lines(s, o, isatty(STDIN_FILENO) && !o->json);
}

int main(int count, char **words) {
    Options o;
    offramp_file *files[2] = {NULL, NULL};
    int code = read_options(&o, count, words);
    if (code >= 0) return code;
    struct sigaction on = {.sa_handler = on_interrupt}, lost = {.sa_handler = on_lost_page};
    sigaction(SIGBUS, &lost, NULL);
    if (isatty(STDIN_FILENO) && !o.prompt) sigaction(SIGINT, &on, NULL);
    colours = isatty(STDOUT_FILENO) && !getenv("NO_COLOR");
    Settings s = {.most = o.tokens, .stop = &stop};
    s.how = (offramp_sampling){.temperature = o.temperature, .top_p = 1, .penalty = 1, .seed = o.seed};
    code = run(&o, &s, files);
    offramp_plan_free(s.plan);
    offramp_file_free(files[1]), offramp_file_free(files[0]);
    return code;
}
