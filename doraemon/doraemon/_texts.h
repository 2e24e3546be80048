/* Texts: byte strings one after the other, their order, and a tree that finds them.
 *
 * The tree is a static B-tree over sorted texts. A node has FAN entries, of which it keeps only 8 bytes each: those after
 * the prefix that all of them share. Where these bytes do not tell, the texts are compared, so no answer depends on how
 * well they were chosen. A query that came down to a node lies between its first text and that of the next node, hence
 * begins with whatever these two share, and only the rest of the node's prefix is compared.
 */
#ifndef DORAEMON_TEXTS_H
#define DORAEMON_TEXTS_H

#include <stdint.h>
#include <string.h>

#include "_portable.h"

enum { FAN = 32, PART = 4, MAX_LAYERS = 13, TEXT_GROUP = 32, FEW_TEXTS = 12 };

typedef struct {
    const uint8_t *at;
    int64_t size;
} Text;

typedef struct {
    const uint8_t *data, *end;
    const int64_t *offsets; /* ascending: text i is from offsets[i] to offsets[i + 1] */
    int64_t n;
} Texts;

static inline Text text_of(const Texts *texts, int64_t i)
{
    return (Text){texts->data + texts->offsets[i], texts->offsets[i + 1] - texts->offsets[i]};
}

/* 8 bytes of a text from `from` on as a number of the same order, zeros where it ends. */
static inline uint64_t chunk_of(Text text, int64_t from, const uint8_t *end)
{
    int64_t left = text.size - from;
    const uint8_t *p = text.at + from;
    uint64_t chunk = 0;
    if (left <= 0)
        return 0;
    if (end - p >= 8) {
        chunk = (uint64_t)p[0] << 56 | (uint64_t)p[1] << 48 | (uint64_t)p[2] << 40 | (uint64_t)p[3] << 32 |
                (uint64_t)p[4] << 24 | (uint64_t)p[5] << 16 | (uint64_t)p[6] << 8 | (uint64_t)p[7];
        return left >= 8 ? chunk : chunk & ~(~UINT64_C(0) >> (8 * left));
    }
    for (int64_t i = 0; i < (left < 8 ? left : 8); i++)
        chunk |= (uint64_t)p[i] << (56 - 8 * i);
    return chunk;
}

/* Below, at or above 0 as a is below, equal to or above b, whose first `from` bytes are known to be equal. */
static inline int compare_texts(Text a, Text b, int64_t from)
{
    int64_t shorter = a.size < b.size ? a.size : b.size;
    int order = shorter > from ? memcmp(a.at + from, b.at + from, (size_t)(shorter - from)) : 0;
    return order != 0 ? order : (a.size > b.size) - (a.size < b.size);
}

static inline uint32_t shared_prefix(Text a, Text b)
{
    int64_t shorter = a.size < b.size ? a.size : b.size, i = 0;
    shorter = shorter < UINT32_MAX ? shorter : UINT32_MAX; /* a shorter prefix is one, too */
    while (i + 8 <= shorter && memcmp(a.at + i, b.at + i, 8) == 0)
        i += 8;
    while (i < shorter && a.at[i] == b.at[i])
        i++;
    return (uint32_t)i;
}

/* ------------------------------------------------------------------ order */

/* A text on its way to its place: 8 bytes of it, and how many are left from these on, 9 for more than 8. */
typedef struct {
    uint64_t chunk;
    int64_t number;
    int left;
} Item;

static inline int order_of(const Item *a, const Item *b)
{
    int by_chunk = (a->chunk > b->chunk) - (a->chunk < b->chunk);
    return by_chunk ? by_chunk : a->left - b->left;
}

static void load_items(const Texts *texts, Item *items, int64_t n, int64_t from)
{
    for (int64_t i = 0; i < n; i++) {
        if (i + 8 < n)
            PREFETCH(texts->data + texts->offsets[items[i + 8].number] + from);
        Text text = text_of(texts, items[i].number);
        int64_t left = text.size - from;
        items[i].chunk = chunk_of(text, from, texts->end);
        items[i].left = left > 8 ? 9 : left > 0 ? (int)left : 0;
    }
}

static void insert_items(const Texts *texts, Item *items, int64_t n, int64_t from)
{
    for (int64_t i = 1; i < n; i++) {
        Item item = items[i];
        Text text = text_of(texts, item.number);
        int64_t j = i;
        for (; j > 0; j--) {
            int order = order_of(items + j - 1, &item);
            if (order == 0 && item.left == 9)
                order = compare_texts(text_of(texts, items[j - 1].number), text, from + 8);
            if (order <= 0)
                break;
            items[j] = items[j - 1];
        }
        items[j] = item;
    }
}

/* Quicksort by the next 8 bytes; those that are equal in them are sorted by the 8 after. The largest of three parts is
 * left to the loop, so that the stack grows with the logarithm of n only. */
static void sort_items(const Texts *texts, Item *items, int64_t n, int64_t from, uint64_t random)
{
    while (n > FEW_TEXTS) {
        random = random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        Item pivot = items[(random >> 32) % (uint64_t)n];
        int64_t less = 0, more = n;
        for (int64_t i = 0; i < more;) {
            int order = order_of(items + i, &pivot);
            if (order == 0) {
                i++;
                continue;
            }
            int64_t to = order < 0 ? less++ : --more;
            Item moved = items[to];
            items[to] = items[i];
            items[i] = moved;
            i += order < 0;
        }
        int64_t same = pivot.left == 9 ? more - less : 0; /* else they are equal to their ends */
        load_items(texts, items + less, same, from + 8);
        struct {
            Item *items;
            int64_t n, from;
        } parts[3] = {{items, less, from}, {items + less, same, from + 8}, {items + more, n - more, from}};
        int largest = parts[1].n > parts[0].n ? 1 : 0;
        largest = parts[2].n > parts[largest].n ? 2 : largest;
        for (int part = 0; part < 3; part++)
            if (part != largest)
                sort_items(texts, parts[part].items, parts[part].n, parts[part].from, random);
        items = parts[largest].items;
        n = parts[largest].n;
        from = parts[largest].from;
    }
    insert_items(texts, items, n, from);
}

/* Whether each text is above the one before it, or (`equal`) at least not below. */
static int are_ascending(const Texts *texts, int equal)
{
    for (int64_t i = 1; i < texts->n; i++)
        if (compare_texts(text_of(texts, i - 1), text_of(texts, i), 0) >= equal)
            return 0;
    return 1;
}

/* The numbers of the texts in their order, and whether each equals the one before it there. */
static void order_texts(const Texts *texts, Item *items, int64_t *order, uint8_t *again)
{
    for (int64_t i = 0; i < texts->n; i++)
        items[i].number = i;
    if (!are_ascending(texts, 1)) {
        load_items(texts, items, texts->n, 0);
        sort_items(texts, items, texts->n, 0, (uint64_t)texts->n);
    }
    for (int64_t i = 0; i < texts->n; i++) {
        order[i] = items[i].number;
        again[i] = i > 0 && compare_texts(text_of(texts, order[i - 1]), text_of(texts, order[i]), 0) == 0;
    }
}

/* ------------------------------------------------------------------ tree */

typedef struct {
    uint64_t rest;  /* 8 bytes of the first text after `outer` */
    uint32_t outer; /* bytes that the first text shares with that of the next node, 0 if there is none */
    uint32_t inner; /* bytes that all texts of the node share, at least `outer` */
} Node;

/* Entry e of a layer is text e * stride and leads to node e of the layer below; node j has the entries from j * FAN on. */
typedef struct {
    uint64_t *codes; /* of each entry, 8 bytes after its node's `inner`; of whole nodes, the last one filled up */
    Node *nodes;
    int64_t n, stride;
} Layer;

typedef struct {
    Texts texts;
    Layer layers[MAX_LAYERS]; /* the lowest first */
    int n_layers;
} Tree;

static inline int64_t nodes_of(int64_t entries) { return (entries + FAN - 1) / FAN; }

/* The bytes that the nodes and codes of a tree take. */
static size_t tree_bytes(int64_t n)
{
    size_t bytes = 0;
    for (;; n = nodes_of(n)) {
        bytes += (size_t)nodes_of(n) * (FAN * sizeof(uint64_t) + sizeof(Node));
        if (n <= FAN)
            return bytes;
    }
}

static void build_layer(const Texts *texts, Layer *layer)
{
    for (int64_t j = 0; j < nodes_of(layer->n); j++) {
        int64_t first = j * FAN, after = first + FAN < layer->n ? first + FAN : layer->n;
        Text begin = text_of(texts, first * layer->stride);
        Node *node = layer->nodes + j;
        node->inner = shared_prefix(begin, text_of(texts, (after - 1) * layer->stride));
        node->outer = after < layer->n ? shared_prefix(begin, text_of(texts, after * layer->stride)) : 0;
        node->rest = chunk_of(begin, node->outer, texts->end);
        for (int64_t e = first; e < first + FAN; e++)
            layer->codes[e] = e < after ? chunk_of(text_of(texts, e * layer->stride), node->inner, texts->end) : UINT64_MAX;
    }
}

/* The tree of sorted, distinct texts, in `memory` of `tree_bytes`, aligned to 8 bytes. */
static void build_tree(Tree *tree, void *memory)
{
    int64_t n = tree->texts.n, stride = 1;
    tree->n_layers = 0;
    for (;; n = nodes_of(n), stride *= FAN) {
        Layer *layer = tree->layers + tree->n_layers++;
        *layer = (Layer){.nodes = memory, .n = n, .stride = stride};
        layer->codes = (uint64_t *)(layer->nodes + nodes_of(n));
        memory = layer->codes + nodes_of(n) * FAN;
        build_layer(&tree->texts, layer);
        if (n <= FAN)
            return;
    }
}

/* Queries on their way down: the node of the present layer, or, once `done`, how many texts are below the query. */
typedef struct {
    Text q[TEXT_GROUP];
    int64_t at[TEXT_GROUP], tied[TEXT_GROUP], m;
    uint8_t done[TEXT_GROUP], exact[TEXT_GROUP];
    const uint8_t *end;
} Descent;

/* Below or above 0 if the query is below or above all texts of the node, of which `number` is the first; 0 if it begins
 * with what they share. */
static inline int beside_node(const Texts *texts, const Node *node, int64_t number, Text q, const uint8_t *end)
{
    int64_t more = (int64_t)node->inner - node->outer;
    if (more == 0)
        return 0;
    uint64_t mask = more >= 8 ? ~UINT64_C(0) : ~(~UINT64_C(0) >> (8 * more));
    uint64_t own = chunk_of(q, node->outer, end) & mask, theirs = node->rest & mask;
    if (own != theirs)
        return own < theirs ? -1 : 1;
    if (more > 8 || q.size < (int64_t)node->inner) {
        Text first = {text_of(texts, number).at, node->inner};
        q.size = q.size < first.size ? q.size : first.size;
        return compare_texts(q, first, node->outer);
    }
    return 0;
}

/* The first entry of the node that is not below the query, but for ties in the bytes that are kept of them. */
static inline int64_t entry_in_node(const Tree *tree, const Layer *layer, int64_t j, Text q, const uint8_t *end,
                                    int *tied)
{
    const Node *node = layer->nodes + j;
    int64_t first = j * FAN, size = layer->n - first < FAN ? layer->n - first : FAN;
    int beside = beside_node(&tree->texts, node, first * layer->stride, q, end);
    *tied = 0;
    if (beside)
        return beside < 0 ? first : first + size;
    uint64_t code = chunk_of(q, node->inner, end);
    int64_t entry = first;
    int64_t parts = 0; /* counted, not bisected, as these comparisons need not wait for each other */
    for (int64_t e = PART - 1; e < FAN - PART; e += PART)
        parts += layer->codes[first + e] < code;
    entry += PART * parts;
    for (int64_t e = first + PART * parts; e < first + PART * (parts + 1); e++)
        entry += layer->codes[e] < code;
    *tied = entry < first + size && layer->codes[entry] == code;
    return entry;
}

/* The first entry from `entry` on whose text is not below the query, among those that are tied with it. */
static inline int64_t untie(const Tree *tree, const Layer *layer, int64_t entry, Text q, uint8_t *exact)
{
    const Node *node = layer->nodes + entry / FAN;
    int64_t after = (entry / FAN + 1) * FAN, low = entry, high = entry + 1;
    after = after < layer->n ? after : layer->n;
    while (high < after && layer->codes[high] == layer->codes[entry])
        high++;
    while (low < high) {
        int64_t middle = (low + high) >> 1;
        int order = compare_texts(text_of(&tree->texts, middle * layer->stride), q, node->inner);
        if (order == 0) {
            *exact = 1;
            return middle;
        }
        low = order < 0 ? middle + 1 : low;
        high = order < 0 ? high : middle;
    }
    return low;
}

static inline void descend(const Tree *tree, const Layer *layer, Descent *d)
{
    int64_t n_tied = 0;
    for (int64_t i = 0; i < d->m; i++)
        if (!d->done[i]) {
            PREFETCH(layer->nodes + d->at[i]);
            for (int64_t e = 0; e < FAN; e += 8)
                PREFETCH(layer->codes + d->at[i] * FAN + e);
        }
    for (int64_t i = 0; i < d->m; i++)
        if (!d->done[i]) {
            int tied;
            d->at[i] = entry_in_node(tree, layer, d->at[i], d->q[i], d->end, &tied);
            d->tied[n_tied] = i;
            n_tied += tied;
            PREFETCH(tree->texts.offsets + (tied ? d->at[i] * layer->stride : 0));
        }
    for (int64_t j = 0; j < n_tied; j++)
        PREFETCH(tree->texts.data + tree->texts.offsets[d->at[d->tied[j]] * layer->stride] +
                 layer->nodes[d->at[d->tied[j]] / FAN].inner);
    for (int64_t j = 0; j < n_tied; j++) {
        int64_t i = d->tied[j];
        d->at[i] = untie(tree, layer, d->at[i], d->q[i], d->exact + i);
    }
    for (int64_t i = 0; i < d->m; i++)
        if (!d->done[i]) {
            d->done[i] = d->exact[i] || d->at[i] == 0 || layer->stride == 1;
            d->at[i] = d->done[i] ? d->at[i] * layer->stride : d->at[i] - 1; /* which is below the query */
        }
}

/* How many texts of the tree are below each of up to TEXT_GROUP queries, and whether it has the query. */
static void find_group(const Tree *tree, Descent *d)
{
    memset(d->at, 0, sizeof d->at);
    memset(d->done, tree->texts.n == 0, sizeof d->done);
    memset(d->exact, 0, sizeof d->exact);
    for (int l = tree->n_layers - 1; l >= 0; l--)
        descend(tree, tree->layers + l, d);
}

/* ------------------------------------------------------------------ copies */

/* The texts of some numbers, one after the other. */
static void gather_texts(const Texts *texts, const int64_t *numbers, int64_t m, uint8_t *out)
{
    for (int64_t i = 0; i < m; i++) {
        if (i + 8 < m)
            PREFETCH(texts->data + texts->offsets[numbers[i + 8]]);
        Text text = text_of(texts, numbers[i]);
        memcpy(out, text.at, (size_t)text.size);
        out += text.size;
    }
}

#endif
