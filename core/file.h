// What is made of a GGUF file: a model of its weights or of the parts that it holds, or the parts and rules
// of exits.

#pragma once
#include "tokenizer.h"

enum { ROLES = 3 };  // of a talk: system, user, assistant

// How a chat template puts a talk together, as offramp's export found it: what stands before the first message
// of the user or of the system, before each of the assistant, and after a message of each role. `known` is 0
// without it.
typedef struct {
    int known, trims[ROLES];
    Bytes first, system, assistant, after[ROLES];
} Chat;

struct offramp_file {
    Gguf gguf;
    offramp_part **parts;
    void **kept;  // memory that parts point to
    int64_t parts_count, parts_room, kept_count, kept_room;
    // Of a model's weights:
    Tokenizer tokenizer;
    Chat chat;
    offramp_model *model;
    int64_t *ends;
    int64_t ends_count, context;
    int plain;  // all weights of blocks and head are float32
};

// Memory that is freed with the file, from a multiple of 64 on; NULL if there is none.
void *keep(offramp_file *file, int64_t bytes);

// An empty part that is freed with the file.
offramp_part *keep_part(offramp_file *file, const char *kind, offramp_error *error);

// Makes the model of a file's weights.
offramp_status load_model(offramp_file *file, offramp_error *error);

// Makes the parts that offramp's export wrote; those of a whole model, and the model.
offramp_status load_saved_parts(offramp_file *file, offramp_error *error);
offramp_status load_saved_model(offramp_file *file, offramp_error *error);

// Gives the model the rotary tables that offramp's export wrote, if any.
offramp_status read_rotary(offramp_file *file, offramp_error *error);

// The part with a number from 0 on; NULL if there is none.
const offramp_part *part_at(const offramp_file *file, int64_t number);
