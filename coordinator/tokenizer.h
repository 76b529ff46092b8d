/* tokenizer.h - text to token ids and back, from a Hugging Face tokenizer.json. Prefix tok_.
 *
 *     struct tokenizer *t;
 *     tok_load(&t, "/models/demo", st);
 *     tok_encode(t, text, len, TOK_ADD_SPECIAL, &ids, &n, st);  ...  free(ids);
 *     struct tok_stream *s;                                      // streaming decode: whole characters only
 *     tok_stream_create(&s, t, TOK_SKIP_SPECIAL, st);
 *     tok_stream_push(s, id, &text, &len);                       // text: valid until the next call
 *
 * Follows the Hugging Face `tokenizers` library to the id. What a tokenizer.json asks for and this module lacks is an
 * error at load that names it (UNIMPLEMENTED), never ignored.
 * Threads: a struct tokenizer is immutable after load, any number of threads may use it; a tok_stream has one user.
 */
#ifndef TANDEM_TOKENIZER_H
#define TANDEM_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

struct tokenizer;

/* dir may be a GGUF file: its metadata then. Else reads DIR/tokenizer.json and, where it exists, DIR/tokenizer_config.json. NOT_FOUND, DATA_LOSS (broken JSON or
 * inconsistent: names file and place), UNIMPLEMENTED (names the type). */
STATUS_MUST_CHECK enum status_code tok_load(struct tokenizer **out, const char *dir, struct status *st);
/* Without a vocabulary, for a server of token ids alone: no text can be encoded (FAILED_PRECONDITION), ids have no text
 * (tok_decode: OUT_OF_RANGE; streams: ""), none is special. */
STATUS_MUST_CHECK enum status_code tok_create_none(struct tokenizer **out, struct status *st);
bool tok_has_text(const struct tokenizer *t); /* not of tok_create_none */
void tok_free(struct tokenizer *t);           /* NULL is fine */

enum tok_flags {
    TOK_ADD_SPECIAL = 1,  /* encode: run the post-processor (BOS) */
    TOK_SKIP_SPECIAL = 2, /* decode: leave special tokens out */
};

/* Special tokens spelled in the text are matched, as in the library. text: UTF-8, may hold NUL; INVALID_ARGUMENT names
 * the offset of the first byte that is not UTF-8. *ids is malloc'ed (NULL when *n is 0), the caller frees it. */
STATUS_MUST_CHECK enum status_code tok_encode(const struct tokenizer *t, const char *text, size_t len, unsigned flags,
                                              uint32_t **ids, size_t *n, struct status *st);

/* *text is malloc'ed and has a NUL behind its *len bytes; always valid UTF-8 (U+FFFD for what is not). An id that is not
 * in the vocabulary: OUT_OF_RANGE. */
STATUS_MUST_CHECK enum status_code tok_decode(const struct tokenizer *t, const uint32_t *ids, size_t n, unsigned flags,
                                              char **text, size_t *len, struct status *st);

uint32_t tok_vocab_size(const struct tokenizer *t); /* highest id + 1 */
/* Bytes of text that one id stands for at most: a text of more than n times so many bytes makes more than n ids, which is
 * known without encoding it. 0: no bound, because text may shrink or vanish before it becomes ids (an added token takes
 * white space along, a normalizer shortens, a pre-tokenizer removes, unknown characters are dropped or fused). */
size_t tok_max_token_bytes(const struct tokenizer *t);
bool tok_is_special(const struct tokenizer *t, uint32_t id);
/* Id of a token by its exact content; -1 when there is none. */
int64_t tok_find(const struct tokenizer *t, const char *content);

/* Streaming decode. What all pushes and the final flush return, put together, equals tok_decode of all ids; each piece
 * is valid UTF-8 and never ends within a character that a later token may complete. Cost per push is bounded (does not
 * grow with the length of the text). prompt ids may be given first with tok_stream_prime, so that a decoder that looks
 * left (the space in front of a sentencepiece word) sees them: the text then continues the prompt, of which only a character
 * that the prompt left unfinished comes again. */
struct tok_stream;
STATUS_MUST_CHECK enum status_code tok_stream_create(struct tok_stream **out, const struct tokenizer *t, unsigned flags,
                                                     struct status *st);
void tok_stream_free(struct tok_stream *s); /* NULL is fine */
void tok_stream_prime(struct tok_stream *s, const uint32_t *ids, size_t n);
/* An id outside the vocabulary adds nothing. */
STATUS_MUST_CHECK enum status_code tok_stream_push(struct tok_stream *s, uint32_t id, const char **text, size_t *len,
                                                   struct status *st);
/* What was held back, an unfinished character as U+FFFD. */
STATUS_MUST_CHECK enum status_code tok_stream_flush(struct tok_stream *s, const char **text, size_t *len,
                                                    struct status *st);

#endif
