/* llama.cpp as llama_cpp.py drives it: its own library, of which a batch is what `llama_decode` takes at once.

     llama_cpp time FILE THREADS SEQUENCES     for each line "STEPS PROMPT" on standard input a line of JSON: seconds
                                               per step, in which each sequence gets a token in one pass through the
                                               model, and seconds from prompts of PROMPT tokens to the first tokens
     llama_cpp quantise FILE OUTPUT TYPE       a file in another type, a number of `llama_ftype`, from weights of any;
     llama_cpp pure FILE OUTPUT TYPE           `pure` has every matrix in that type
     llama_cpp losses FILE THREADS LENGTH      for each LENGTH tokens (int32) on standard input a line: the sum of their
                                               negative log likelihoods in nats, the first token's left out

   LIBRARIES in the environment is the folder of its kernels, of which it takes those for the processor. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ggml-backend.h"
#include "llama.h"

enum { CONTEXT = 2048, BATCH = 2048 }; /* tokens of a sequence, and of one call */

typedef struct ggml_threadpool *new_threadpool(struct ggml_threadpool_params *);

static void fail(const char *what) {
    fprintf(stderr, "llama.cpp: %s\n", what);
    exit(1);
}

static void only_errors(enum ggml_log_level level, const char *text, void *unused) {
    (void)unused;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static double now(void) {
    struct timespec clock;
    clock_gettime(CLOCK_MONOTONIC, &clock);
    return clock.tv_sec + 1e-9 * clock.tv_nsec;
}

static struct llama_model *load(const char *path) {
    struct llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    struct llama_model *model = llama_model_load_from_file(path, params);
    if (!model) fail("it cannot load the model");
    return model;
}

/* Threads stay from step to step, as in llama.cpp's own programs. */
static struct llama_context *context_of(struct llama_model *model, int threads, int sequences) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = sequences * CONTEXT;
    params.n_batch = BATCH;
    params.n_seq_max = sequences;
    params.n_threads = params.n_threads_batch = threads;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) fail("it cannot make a context");
    ggml_backend_reg_t cpu = ggml_backend_dev_backend_reg(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    new_threadpool *make = (new_threadpool *)ggml_backend_reg_get_proc_address(cpu, "ggml_threadpool_new");
    struct ggml_threadpool_params pool = ggml_threadpool_params_default(threads);
    llama_attach_threadpool(context, make(&pool), NULL);
    return context;
}

static void add(struct llama_batch *batch, llama_token token, int position, int sequence, bool logits) {
    int n = batch->n_tokens++;
    batch->token[n] = token;
    batch->pos[n] = position;
    batch->n_seq_id[n] = 1;
    batch->seq_id[n][0] = sequence;
    batch->logits[n] = logits;
}

static void pass(struct llama_context *context, struct llama_batch *batch) {
    if (llama_decode(context, *batch)) fail("it cannot decode the batch");
    llama_synchronize(context);
}

static llama_token likeliest(const float *logits, int vocabulary) {
    int best = 0;
    for (int token = 1; token < vocabulary; token++)
        if (logits[token] > logits[best]) best = token;
    return best;
}

/* All prompts, as many tokens at once as a batch has room for; then steps of one token for each sequence. */
static void time_steps(struct llama_context *context, int vocabulary, int sequences, int steps, int prompt) {
    struct llama_batch batch = llama_batch_init(BATCH, 0, 1);
    llama_token *tokens = malloc(sequences * sizeof *tokens);
    llama_memory_clear(llama_get_memory(context), true);
    double start = now();
    for (int sequence = 0; sequence < sequences; sequence++)
        for (int place = 0; place < prompt; place++) {
            bool last = place == prompt - 1;
            add(&batch, 5 + place, place, sequence, last);
            if (batch.n_tokens < BATCH && !(last && sequence == sequences - 1)) continue;
            pass(context, &batch);
            for (int n = 0; n < batch.n_tokens; n++)
                if (batch.logits[n])
                    tokens[batch.seq_id[n][0]] = likeliest(llama_get_logits_ith(context, n), vocabulary);
            batch.n_tokens = 0;
        }
    double first = now();
    for (int step = 0; step < steps; step++) {
        batch.n_tokens = 0;
        for (int n = 0; n < sequences; n++) add(&batch, tokens[n], prompt + step, n, true);
        pass(context, &batch);
        for (int n = 0; n < sequences; n++) tokens[n] = likeliest(llama_get_logits_ith(context, n), vocabulary);
    }
    printf("{\"step\": %.9g, \"first\": %.9g}\n", (now() - first) / steps, first - start);
    fflush(stdout);
    free(tokens);
    llama_batch_free(batch);
}

static double loss(const float *logits, int vocabulary, llama_token token) {
    double sum = 0, most = logits[likeliest(logits, vocabulary)];
    for (int n = 0; n < vocabulary; n++) sum += exp(logits[n] - most);
    return most + log(sum) - logits[token];
}

static void print_losses(struct llama_context *context, int vocabulary, int length) {
    struct llama_batch batch = llama_batch_init(length, 0, 1);
    llama_token *window = malloc(length * sizeof *window);
    while (fread(window, sizeof *window, length, stdin) == (size_t)length) {
        double sum = 0;
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = 0;
        for (int place = 0; place < length; place++) add(&batch, window[place], place, 0, true);
        pass(context, &batch);
        for (int place = 0; place < length - 1; place++)
            sum += loss(llama_get_logits_ith(context, place), vocabulary, window[place + 1]);
        printf("%.9g\n", sum);
        fflush(stdout);
    }
}

static void quantise(const char *from, const char *to, int type, bool pure) {
    struct llama_model_quantize_params params = llama_model_quantize_default_params();
    params.nthread = 1;
    params.pure = pure;
    params.ftype = type;
    params.allow_requantize = true;
    if (llama_model_quantize(from, to, &params)) fail("it cannot quantise the model");
}

int main(int count, char **words) {
    const char *libraries = getenv("LIBRARIES");
    if (!libraries) fail("LIBRARIES is not set");
    llama_log_set(only_errors, NULL);
    ggml_backend_load_all_from_path(libraries);
    if (count != 5) fail("time, quantise, pure or losses, each with three arguments");
    bool pure = !strcmp(words[1], "pure"), timing = !strcmp(words[1], "time");
    if (pure || !strcmp(words[1], "quantise")) {
        quantise(words[2], words[3], atoi(words[4]), pure);
        return 0;
    }
    struct llama_model *model = load(words[2]);
    int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model)), last = atoi(words[4]), steps, prompt;
    struct llama_context *context = context_of(model, atoi(words[3]), timing ? last : 1);
    if (!timing) {
        print_losses(context, vocabulary, last);
        return 0;
    }
    unsigned long long bytes = llama_model_size(model);
    printf("{\"bytes\": %llu, \"system\": \"%s\"}\n", bytes, llama_print_system_info());
    fflush(stdout);
    while (scanf("%d %d", &steps, &prompt) == 2) time_steps(context, vocabulary, last, steps, prompt);
    return 0;
}
