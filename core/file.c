// GGUF files: opened, and what can be asked of them.

#include "file.h"

#include <stdlib.h>

void *keep(offramp_file *file, int64_t bytes) {
    if (file->kept_count == file->kept_room) {
        const int64_t room = 2 * file->kept_room + 64;
        void **longer = realloc(file->kept, room * sizeof *longer);
        if (!longer) return NULL;
        file->kept = longer, file->kept_room = room;
    }
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    if (memory) file->kept[file->kept_count++] = memory;
    return memory;
}

offramp_part *keep_part(offramp_file *file, const char *kind, offramp_error *error) {
    if (file->parts_count == file->parts_room) {
        const int64_t room = 2 * file->parts_room + 64;
        offramp_part **longer = realloc(file->parts, room * sizeof *longer);
        if (!longer) return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a part."), NULL;
        file->parts = longer, file->parts_room = room;
    }
    offramp_part *part = offramp_part_new(kind, error);
    if (part) file->parts[file->parts_count++] = part;
    return part;
}

// The tokens that end a text: as offramp's export found them, or those that the file names.
static offramp_status read_ends(offramp_file *file, offramp_error *error) {
    static const char *const keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"};
    const Entry *known = entry_of(&file->gguf, "offramp.ends");
    file->ends = keep(file, (known ? known->count : 2) * (int64_t)sizeof *file->ends);
    if (!file->ends) return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for the ends.");
    for (int64_t i = 0; i < (known ? known->count : 2); i++) {
        const Entry *entry = known ? known : entry_of(&file->gguf, keys[i]);
        const int64_t id = integer_of(entry, known ? i : 0, -1);
        if (id >= 0) file->ends[file->ends_count++] = id;
    }
    return OFFRAMP_OK;
}

static void read_chat(offramp_file *file) {
    static const char *const keys[] = {"first", "system", "assistant", "after_system", "answer", "next"};
    Chat *chat = &file->chat;
    Bytes *const texts[] = {&chat->first,    &chat->system,   &chat->assistant,
                            chat->after + 0, chat->after + 1, chat->after + 2};
    chat->known = 1;
    for (int i = 0; i < 6; i++) {
        char key[40] = "offramp.chat.";
        const Entry *entry = entry_of(&file->gguf, strcat(key, keys[i]));
        *texts[i] = text_of(entry);
        chat->known &= entry != NULL;
    }
    for (int i = 0; i < ROLES; i++)
        chat->trims[i] = integer_of(entry_of(&file->gguf, "offramp.chat.trims"), i, 0) == 1;
}

static offramp_status read_file(offramp_file *file, const char *path, offramp_error *error) {
    offramp_status status = gguf_open(&file->gguf, path, error);
    if (status) return status;
    const Bytes architecture = text_of(entry_of(&file->gguf, "general.architecture"));
    if (bytes_are(architecture, "offramp")) return load_saved_parts(file, error);
    status = tokenizer_open(&file->tokenizer, &file->gguf, error);
    const int parts = bytes_are(architecture, "offramp-model");
    if (!status) status = parts ? load_saved_model(file, error) : load_model(file, error);
    if (!status) status = read_ends(file, error);
    if (status) return status;
    NEED(file->tokenizer.count <= file->model->vocabulary,
         "The file names more tokens than its embedding has.");
    read_chat(file);
    return OFFRAMP_OK;
}

// Says what a model's file does not.
static void say_what_is_missing(const offramp_file *file, offramp_log log, void *context) {
    if (!entry_of(&file->gguf, "offramp.fingerprint"))
        log(context,
            "offramp's export did not write this file, so it does not say which exits fit it, nor which "
            "products may be rounded to 8 bits.");
    if (!file->chat.known)
        log(context, "The file's chat template is not known, so prompts are read as they are.");
}

offramp_file *offramp_file_new(const char *path, offramp_log log, void *context, offramp_error *error) {
    offramp_file *file = calloc(1, sizeof *file);
    if (!file) return fail(error, OFFRAMP_NO_MEMORY, "There is no memory for a file."), NULL;
    if (!read_file(file, path, error)) {
        if (log && file->model) say_what_is_missing(file, log, context);
        return file;
    }
    offramp_file_free(file);
    return NULL;
}

void offramp_file_free(offramp_file *file) {
    if (!file) return;
    offramp_model_free(file->model);
    for (int64_t i = 0; i < file->parts_count; i++) offramp_part_free(file->parts[i]);
    for (int64_t i = 0; i < file->kept_count; i++) free(file->kept[i]);
    free(file->parts), free(file->kept);
    tokenizer_close(&file->tokenizer);
    gguf_close(&file->gguf);
    free(file);
}

offramp_model *offramp_file_model(const offramp_file *file) { return file->model; }

int64_t offramp_file_context(const offramp_file *file) { return file->context; }

const int64_t *offramp_file_ends(const offramp_file *file, int64_t *count) {
    *count = file->ends_count;
    return file->ends;
}

offramp_session *offramp_file_session(const offramp_file *file, int64_t tokens, offramp_error *error) {
    if (!file->model) return fail(error, OFFRAMP_INVALID, "A file of exits has no sessions."), NULL;
    return offramp_session_new(file->model, file->plain ? OFFRAMP_FLOAT32 : OFFRAMP_BFLOAT16, tokens, error);
}

const char *offramp_file_text(const offramp_file *file, const char *key, int64_t *length) {
    const Entry *entry = entry_of(&file->gguf, key);
    const Bytes text = text_of(entry);
    *length = text.length;
    return entry ? text.at : NULL;
}

double offramp_file_number(const offramp_file *file, const char *key, int64_t i, double otherwise) {
    return real_of(entry_of(&file->gguf, key), i, otherwise);
}

int64_t offramp_file_count(const offramp_file *file, const char *key) {
    const Entry *entry = entry_of(&file->gguf, key);
    return entry ? entry->count : 0;
}

int64_t offramp_tokenise(const offramp_file *file, const char *text, int64_t length, int whole, int64_t *ids,
                         int64_t room) {
    const int64_t first = whole && file->model ? file->tokenizer.first : -1, before = first >= 0;
    if (before && room > 0) ids[0] = first;
    const int64_t count =
        file->model ? tokenise(&file->tokenizer, text, length, ids + before, larger(0, room - before)) : 0;
    return count < 0 ? count : before + count;
}

const char *offramp_token(const offramp_file *file, int64_t id, int64_t *length, int *special) {
    const Tokenizer *t = &file->tokenizer;
    const int known = id >= 0 && id < t->count;
    *length = known ? t->shown[id].length : 0, *special = known ? t->special[id] : 0;
    return known ? t->shown[id].at : "";
}

// A talk on its way to ids: `count` of them so far, of which `room` are kept, and the text that follows.
typedef struct {
    const Tokenizer *tokenizer;
    int64_t *ids, count, room;
    char *text;
    int64_t length, text_room;
    int failed;
} Talk;

static void put(Talk *to, const char *text, int64_t length) {
    if (to->length + length > to->text_room) {
        to->text_room = 2 * (to->length + length);
        char *longer = realloc(to->text, to->text_room);
        to->failed |= !longer;
        if (longer) to->text = longer;
    }
    if (to->failed) return;
    memcpy(to->text + to->length, text, length);
    to->length += length;
}

// Makes the text so far ids. What follows makes no token together with it.
static void cut(Talk *to) {
    const int64_t left = larger(0, to->room - to->count);
    const int64_t count =
        to->failed ? -1
                   : tokenise(to->tokenizer, to->text, to->length, left ? to->ids + to->count : NULL, left);
    to->failed |= count < 0;
    to->count += larger(0, count), to->length = 0;
}

// A message, without the white space around it if the template trims it. Special tokens in it are cut, so that
// they are text: a message cannot begin another one.
static void put_message(Talk *to, const char *text, int trims) {
    const uint8_t *at = (const uint8_t *)text, *end = at + strlen(text), *first = end, *last = end;
    for (int32_t point; at < end;) {
        const uint8_t *own = at;
        at += decode_point(at, end, &point);
        if (trims && is_white(point)) continue;
        if (first == end) first = own;
        last = at;
    }
    for (int32_t point; first < last;) {
        const int length = decode_point(first, last, &point);
        const int special = special_at(to->tokenizer, (const char *)first, last - first);
        put(to, (const char *)first, length);
        if (special) cut(to);
        first += length;
    }
}

int64_t offramp_chat(const offramp_file *file, const offramp_message *messages, int64_t count, int64_t *ids,
                     int64_t room) {
    const Chat *chat = &file->chat;
    Talk to = {.tokenizer = &file->tokenizer, .ids = ids, .room = room};
    int64_t role = -1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t before = role;
        role = messages[i].role;
        const int begins = before < 0 && role == OFFRAMP_SYSTEM, answers = role == OFFRAMP_ASSISTANT;
        to.failed |= !chat->known || (!begins && !(role == OFFRAMP_USER && before != OFFRAMP_USER) &&
                                      !(answers && before == OFFRAMP_USER));
        if (to.failed) break;
        const Bytes start = begins ? chat->system : chat->first, after = chat->after[role];
        if (i == 0) put(&to, start.at, start.length);
        if (answers) put(&to, chat->assistant.at, chat->assistant.length);
        put_message(&to, messages[i].text, chat->trims[role]);
        put(&to, after.at, after.length);
    }
    to.failed |= role != OFFRAMP_USER;
    cut(&to);
    free(to.text);
    return to.failed ? -1 : to.count;
}
