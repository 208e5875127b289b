"""The plan of tiles in four launches: the very arrays of `voco_kernels.tiles.build_tiles`, for a layout on a GPU.

The tensor operations of tiles.py are some eighty launches. Here a launch ends only where every program has to know something
of all others:

1. `count_kernel` counts the kinds of tokens of each chunk;
2. `index_kernel` adds up the chunks before its own, and writes the lists, and how many of each kind stand before each token;
3. `draft_kernel` finds the tiles in the order of the lists, and ranks those of one weight within a chunk;
4. `list_kernel` adds up the chunks again, now weight by weight, and puts each tile in its place.

A chunk is what one program works through, block by block. There are at most CHUNKS of them, so every program can read what
all of them counted, and the work per token stays the same however many tokens there are. No program waits for another, no
result depends on which one is first, and the host reads nothing.

Values are unchecked. Nonsense makes a plan of nonsense, but no access leaves its tensor, and no tile leaves the layout.
"""

import torch
import triton
import triton.language as tl

from ...layout import VocoLayout
from ...tiles import KEY_TILE, LIGHTEST, ROW_TILE, WEIGHTS, Geometry, TilePlan
from .steps import on_device

# One token per thread: at 16k tokens a launch is as long as what its threads do one after the other, and 64 programs (or
# 128, for rows and keys) have a multiprocessor each.
BLOCK = 256
WARPS = 8
CHUNKS = 256

# What `count_kernel` leaves of a chunk, int32 [CHUNKS] each: how many tokens it has of some kinds, its last start of a run
# and its last public token (negative where it has none). LATE counts as if no public key stood before the chunk; EARLY are
# the rows that are late as well if one does, in the segment that reaches into the chunk.
PUBLIC, OPEN, PADDING, LATE, EARLY, LAST_START, LAST_PUBLIC = (tl.constexpr(field) for field in range(7))
CHUNK_FIELDS = 7

# What is known of a token, int32 [N + 1] each: how many of the first four kinds stand before it (or before the end); where
# its segment begins, or -1; where the segment ends that begins here, undefined if none does; the range of its document.
SEGMENT_BEGIN, SEGMENT_END, DOCUMENT_BEGIN, DOCUMENT_END = (tl.constexpr(field) for field in range(4, 8))
TOKEN_FIELDS = 8


@triton.jit
def _kinds(segment_ptr, public_ptr, tokens, num_tokens):
    """(in a segment, open, padding, public) for each token; all False behind the last one.

    The flag counts in segments only, elsewhere it follows from the id. So every token is one kind of row and one of key,
    whatever the values, and the lists of all tokens have no gaps.
    """
    valid = tokens < num_tokens
    segment = tl.load(segment_ptr + tokens, mask=valid, other=0)
    flag = tl.load(public_ptr + tokens, mask=valid, other=0) != 0
    in_segment, is_open = segment > 0, valid & (segment == 0)
    return in_segment, is_open, segment < 0, is_open | (in_segment & flag)


@triton.jit
def _starts(segment_ptr, tokens, num_tokens):
    """Whether a run of one segment id (or of open rows, or of padding) starts at each token."""
    valid = tokens < num_tokens
    segment = tl.load(segment_ptr + tokens, mask=valid, other=0)
    previous = tl.load(segment_ptr + tokens - 1, mask=valid & (tokens > 0), other=0)
    return valid & ((tokens == 0) | (segment != previous))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _latest(tokens, flags, before):
    """The last flagged one among the tokens up to each; `before`, which is less, where there is none."""
    return tl.associative_scan(tl.where(flags, tokens, before), 0, _larger)


@triton.jit
def _store_documents(cu_seqlens_ptr, tokens_ptr, tokens, num_tokens, num_documents, search_steps):
    """Write the range of each token's document, found by bisection. The token is in that range whatever the values."""
    valid = tokens < num_tokens
    low = tl.zeros_like(tokens)
    high = low + num_documents + 1
    for _ in range(search_steps):
        middle = (low + high) // 2
        end = tl.load(cu_seqlens_ptr + middle, mask=middle <= num_documents, other=num_tokens)
        low = tl.where((low < high) & (end <= tokens), middle + 1, low)
        high = tl.where(end <= tokens, high, tl.minimum(middle, high))
    begin = tl.load(cu_seqlens_ptr + tl.maximum(low - 1, 0), mask=valid, other=0)
    end = tl.load(cu_seqlens_ptr + tl.minimum(low, num_documents), mask=valid, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    end = tl.maximum(tl.minimum(end, num_tokens), tokens + 1)
    field = tl.cast(num_tokens, tl.int64) + 1
    tl.store(tokens_ptr + DOCUMENT_BEGIN * field + tokens, begin, mask=valid)
    tl.store(tokens_ptr + DOCUMENT_END * field + tokens, end, mask=valid)


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "search_steps", "chunk"])
def count_kernel(
    segment_ptr, public_ptr, cu_seqlens_ptr, tokens_ptr, chunks_ptr, num_tokens, num_documents, search_steps, chunk,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the CHUNK_FIELDS of one chunk of `chunk` tokens, and the documents of its tokens.

    segment_ptr [N] int32, public_ptr [N] bool, cu_seqlens_ptr [num_documents + 1] int32.
    """
    first = tl.program_id(0) * chunk
    zeros = tl.zeros([BLOCK], tl.int32)
    publics, opens, paddings, lates, earlies = zeros, zeros, zeros, zeros, zeros
    # Public keys before the chunk are before the start of any run, even of one that started there.
    last_start, last_public = -1, -2
    for start in range(first, tl.minimum(first + chunk, num_tokens), BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        _store_documents(cu_seqlens_ptr, tokens_ptr, tokens, num_tokens, num_documents, search_steps)
        in_segment, is_open, padding, public = _kinds(segment_ptr, public_ptr, tokens, num_tokens)
        starts_up_to = _latest(tokens, _starts(segment_ptr, tokens, num_tokens), last_start)
        publics_up_to = _latest(tokens, public, last_public)
        late = in_segment & (publics_up_to >= starts_up_to)
        publics += public.to(tl.int32)
        opens += is_open.to(tl.int32)
        paddings += padding.to(tl.int32)
        lates += late.to(tl.int32)
        earlies += (in_segment & (starts_up_to < 0) & (publics_up_to < 0)).to(tl.int32)
        last_start, last_public = tl.max(starts_up_to, 0), tl.max(publics_up_to, 0)
    chunk_ptr = chunks_ptr + tl.program_id(0)
    tl.store(chunk_ptr + PUBLIC * CHUNKS, tl.sum(publics, 0))
    tl.store(chunk_ptr + OPEN * CHUNKS, tl.sum(opens, 0))
    tl.store(chunk_ptr + PADDING * CHUNKS, tl.sum(paddings, 0))
    tl.store(chunk_ptr + LATE * CHUNKS, tl.sum(lates, 0))
    tl.store(chunk_ptr + EARLY * CHUNKS, tl.sum(earlies, 0))
    tl.store(chunk_ptr + LAST_START * CHUNKS, last_start)
    tl.store(chunk_ptr + LAST_PUBLIC * CHUNKS, last_public)


@triton.jit
def _chunk_sums(chunks_ptr, this, num_chunks, FIELD: tl.constexpr, CHUNKS: tl.constexpr):
    """(sum over the chunks before `this`, sum over all) of one field."""
    chunks = tl.arange(0, CHUNKS)
    counts = tl.load(chunks_ptr + FIELD * CHUNKS + chunks, mask=chunks < num_chunks, other=0)
    return tl.sum(tl.where(chunks < this, counts, 0), 0), tl.sum(counts, 0)


@triton.jit
def _late_sums(chunks_ptr, this, num_chunks, CHUNKS: tl.constexpr):
    """(late rows before chunk `this`, late rows in all, last start and last public token before the chunk).

    The segment that reaches into a chunk has public keys there already if the last public token before the chunk is not
    before the last start.
    """
    chunks = tl.arange(0, CHUNKS)
    valid = chunks < num_chunks
    after_first = valid & (chunks > 0)
    starts = tl.load(chunks_ptr + LAST_START * CHUNKS + chunks - 1, mask=after_first, other=-1)
    publics = tl.load(chunks_ptr + LAST_PUBLIC * CHUNKS + chunks - 1, mask=after_first, other=-2)
    starts, publics = tl.associative_scan(starts, 0, _larger), tl.associative_scan(publics, 0, _larger)
    late = tl.load(chunks_ptr + LATE * CHUNKS + chunks, mask=valid, other=0)
    early = tl.load(chunks_ptr + EARLY * CHUNKS + chunks, mask=valid, other=0)
    late += tl.where(publics >= starts, early, 0)
    last_start = tl.max(tl.where(chunks == this, starts, -1), 0)
    last_public = tl.max(tl.where(chunks == this, publics, -2), 0)
    return tl.sum(tl.where(chunks < this, late, 0), 0), tl.sum(late, 0), last_start, last_public


@triton.jit
def _counted(tokens_ptr, tokens, flags, before, num_tokens, FIELD: tl.constexpr):
    """How many flagged tokens stand before each one, with `before` before the block; writes that to a field."""
    up_to = tl.cumsum(flags.to(tl.int32), 0) + before
    field_ptr = tokens_ptr + FIELD * (tl.cast(num_tokens, tl.int64) + 1)
    tl.store(field_ptr + tokens + 1, up_to, mask=tokens < num_tokens)
    tl.store(field_ptr + tokens, 0, mask=tokens == 0)
    return up_to - flags.to(tl.int32)


@triton.jit
def _store_segments(segment_ptr, tokens_ptr, tokens, in_segment, segment_begin, num_tokens):
    """Write where the segment of each token begins and, for the last token of a segment, where that segment ends."""
    field = tl.cast(num_tokens, tl.int64) + 1
    segment = tl.where(in_segment, segment_begin, -1)
    tl.store(tokens_ptr + SEGMENT_BEGIN * field + tokens, segment, mask=tokens < num_tokens)
    ends = in_segment & ((tokens == num_tokens - 1) | _starts(segment_ptr, tokens + 1, num_tokens))
    tl.store(tokens_ptr + SEGMENT_END * field + segment_begin, tokens + 1, mask=ends)


@triton.jit
def _store_list(list_ptr, tokens, flags, slots, length, num_tokens):
    """Write flagged tokens to their slots of a list, and zeros to those of the block's own slots that lie behind its end."""
    tl.store(list_ptr + slots, tokens, mask=flags)
    tl.store(list_ptr + tokens, 0, mask=(tokens >= length) & (tokens < num_tokens))


@triton.jit(do_not_specialize=["num_tokens", "chunk", "num_chunks"])
def index_kernel(
    segment_ptr, public_ptr, tokens_ptr, chunks_ptr, row_index_ptr, key_index_ptr, reader_index_ptr, late_index_ptr,
    num_tokens, chunk, num_chunks, ISOLATED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the TOKEN_FIELDS of one chunk, and its tokens in the four lists [N] int32."""
    this = tl.program_id(0)
    publics, all_public = _chunk_sums(chunks_ptr, this, num_chunks, PUBLIC, CHUNKS)
    opens, all_open = _chunk_sums(chunks_ptr, this, num_chunks, OPEN, CHUNKS)
    paddings, all_padding = _chunk_sums(chunks_ptr, this, num_chunks, PADDING, CHUNKS)
    lates, all_late, last_start, last_public = _late_sums(chunks_ptr, this, num_chunks, CHUNKS)
    first, rows = this * chunk, num_tokens - all_padding
    for start in range(first, tl.minimum(first + chunk, num_tokens), BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        in_segment, is_open, padding, public = _kinds(segment_ptr, public_ptr, tokens, num_tokens)
        segment_begin = _latest(tokens, _starts(segment_ptr, tokens, num_tokens), last_start)
        publics_up_to = _latest(tokens, public, last_public)
        late = in_segment & (publics_up_to >= segment_begin)
        _store_segments(segment_ptr, tokens_ptr, tokens, in_segment, segment_begin, num_tokens)

        public_before = _counted(tokens_ptr, tokens, public, publics, num_tokens, PUBLIC)
        open_before = _counted(tokens_ptr, tokens, is_open, opens, num_tokens, OPEN)
        padding_before = _counted(tokens_ptr, tokens, padding, paddings, num_tokens, PADDING)
        late_before = _counted(tokens_ptr, tokens, late, lates, num_tokens, LATE)

        # Segments (or their private keys), then open rows (public keys), then padding.
        row_slot = tl.where(is_open, rows - all_open + open_before, tokens - open_before - padding_before)
        key_slot = tl.where(public, rows - all_public + public_before, tokens - public_before - padding_before)
        valid = tokens < num_tokens
        tl.store(row_index_ptr + tl.where(padding, rows + padding_before, row_slot), tokens, mask=valid)
        tl.store(key_index_ptr + tl.where(padding, rows + padding_before, key_slot), tokens, mask=valid)
        if ISOLATED:
            _store_list(reader_index_ptr, tokens, is_open, open_before, all_open, num_tokens)
        else:
            _store_list(reader_index_ptr, tokens, valid & ~padding, tokens - padding_before, rows, num_tokens)
        _store_list(late_index_ptr, tokens, late, late_before, all_late, num_tokens)

        publics += tl.sum(public.to(tl.int32), 0)
        opens += tl.sum(is_open.to(tl.int32), 0)
        paddings += tl.sum(padding.to(tl.int32), 0)
        lates += tl.sum(late.to(tl.int32), 0)
        last_start, last_public = tl.max(segment_begin, 0), tl.max(publics_up_to, 0)


@triton.jit
def _tile_begins(at, length, SIZE: tl.constexpr, SMALL: tl.constexpr):
    """(whether a tile begins at each place of its run, and with how many members), as in tiles.py."""
    if SMALL == 0:
        before = SIZE - 1 - (length + SIZE - 1) % SIZE
        begins = ((at + before) % SIZE == 0) | (at == 0)
        size = tl.where(at == 0, SIZE - before, SIZE)
    else:
        inside = at % SIZE
        rest = length - at + inside
        is_small = (rest < SIZE) & (rest <= 2 * SMALL)
        begins = tl.where(is_small, inside % SMALL, inside) == 0
        size = tl.where(is_small, SMALL, SIZE)
    return begins, tl.minimum(length - at, size)


@triton.jit
def _readers_before(tokens_ptr, tokens, wanted, field, ISOLATED: tl.constexpr):
    """How many rows that see public keys outside their segment stand before each token; 0 where not wanted."""
    if ISOLATED:
        readers = tl.load(tokens_ptr + OPEN * field + tokens, mask=wanted, other=0)
    else:
        padding = tl.load(tokens_ptr + PADDING * field + tokens, mask=wanted, other=0)
        readers = tl.where(wanted, tokens - padding, 0)
    return readers


@triton.jit
def _after(tokens_ptr, tokens, wanted, field):
    """(first token that may see each key from outside its segment, where that segment begins, or -1)."""
    segment = tl.load(tokens_ptr + SEGMENT_BEGIN * field + tokens, mask=wanted, other=-1)
    end = tl.load(tokens_ptr + SEGMENT_END * field + segment, mask=segment >= 0, other=0)
    return tl.where(segment >= 0, end, tokens), segment


@triton.jit
def _draft_rows(
    tokens_ptr, row_index_ptr, drafts_ptr, slots, num_tokens,
    ISOLATED: tl.constexpr, ROWS: tl.constexpr, SMALL_ROWS: tl.constexpr,
):  # fmt: skip
    """(whether a row tile begins at each slot, the longest range of its run); writes the tiles' columns."""
    field = tl.cast(num_tokens, tl.int64) + 1
    public_ptr, open_ptr = tokens_ptr + PUBLIC * field, tokens_ptr + OPEN * field
    opens, paddings = tl.load(open_ptr + num_tokens), tl.load(tokens_ptr + PADDING * field + num_tokens)
    rows = num_tokens - paddings
    privates = rows - tl.load(public_ptr + num_tokens)
    in_segment, is_row = slots < rows - opens, slots < rows
    is_open = is_row & ~in_segment

    token = tl.load(row_index_ptr + slots, mask=slots < num_tokens, other=0)
    document_begin = tl.load(tokens_ptr + DOCUMENT_BEGIN * field + token, mask=is_row, other=0)
    document_end = tl.load(tokens_ptr + DOCUMENT_END * field + token, mask=is_open, other=0)
    segment_begin = tl.load(tokens_ptr + SEGMENT_BEGIN * field + token, mask=in_segment, other=0)
    segment_end = tl.load(tokens_ptr + SEGMENT_END * field + segment_begin, mask=in_segment, other=0)
    open_begin = tl.load(open_ptr + document_begin, mask=is_open, other=0)
    open_end = tl.load(open_ptr + document_end, mask=is_open, other=0)
    at = tl.where(in_segment, token - segment_begin, tl.where(is_open, slots - (rows - opens) - open_begin, slots - rows))
    length = tl.where(in_segment, segment_end - segment_begin, tl.where(is_open, open_end - open_begin, paddings))
    begins, count = _tile_begins(at, length, ROWS, SMALL_ROWS)
    begins = begins & (slots < num_tokens)

    # Rows of a segment see the same public keys; an open row also sees those of the rows before it.
    public_begin = tl.where(is_row, privates + tl.load(public_ptr + document_begin, mask=is_row, other=0), 0)
    seen_end = public_begin
    if not ISOLATED:
        before_segment = privates + tl.load(public_ptr + segment_begin, mask=in_segment, other=0)
        seen_end = tl.maximum(public_begin, tl.where(in_segment, before_segment, 0))
    first_end = privates + 1 + tl.load(public_ptr + token, mask=is_open, other=0)
    last = tl.load(row_index_ptr + slots + count - 1, mask=begins & is_open, other=0)
    last_end = privates + 1 + tl.load(public_ptr + last, mask=begins & is_open, other=0)

    draft_ptr = drafts_ptr + slots
    tl.store(draft_ptr + 1 * field, slots, mask=begins)
    tl.store(draft_ptr + 2 * field, count, mask=begins)
    tl.store(draft_ptr + 3 * field, public_begin, mask=begins)
    tl.store(draft_ptr + 4 * field, tl.where(is_open, first_end, seen_end), mask=begins)
    tl.store(draft_ptr + 5 * field, tl.where(is_open, last_end, seen_end), mask=begins)
    tl.store(draft_ptr + 6 * field, segment_begin, mask=begins)
    tl.store(draft_ptr + 7 * field, tl.where(in_segment, token + 1, 0), mask=begins)
    tl.store(draft_ptr + 8 * field, tl.where(in_segment, token + count, 0), mask=begins)
    public_end = privates + tl.load(public_ptr + document_end, mask=is_open, other=0)
    longest = tl.where(in_segment, seen_end - public_begin + length, tl.where(is_open, public_end - public_begin, 0))
    return begins, longest


@triton.jit
def _draft_keys(
    tokens_ptr, key_index_ptr, after_ptr, drafts_ptr, slots, num_tokens, ISOLATED: tl.constexpr, KEYS: tl.constexpr
):
    """(whether a key tile begins at each slot, the longest range of its run); writes the tiles' columns, and `after`."""
    field = tl.cast(num_tokens, tl.int64) + 1
    public_ptr, late_ptr = tokens_ptr + PUBLIC * field, tokens_ptr + LATE * field
    publics, paddings = tl.load(public_ptr + num_tokens), tl.load(tokens_ptr + PADDING * field + num_tokens)
    keys = num_tokens - paddings
    valid, is_key, is_private = slots < num_tokens, slots < keys, slots < keys - publics
    is_public = is_key & ~is_private

    token = tl.load(key_index_ptr + slots, mask=valid, other=0)
    after, segment_begin = _after(tokens_ptr, token, valid, field)
    tl.store(after_ptr + token, after, mask=valid)
    document_begin = tl.load(tokens_ptr + DOCUMENT_BEGIN * field + token, mask=is_public, other=0)
    document_end = tl.load(tokens_ptr + DOCUMENT_END * field + token, mask=is_public, other=0)
    run_begin, run_end = tl.where(is_private, segment_begin, document_begin), tl.where(is_private, after, document_end)
    public_begin = tl.load(public_ptr + run_begin, mask=is_key, other=0)
    public_at = tl.load(public_ptr + token, mask=is_key, other=0) - public_begin
    public_length = tl.load(public_ptr + run_end, mask=is_key, other=0) - public_begin
    at = tl.where(is_private, token - run_begin - public_at, tl.where(is_public, public_at, slots - keys))
    length = tl.where(is_private, run_end - run_begin - public_length, tl.where(is_public, public_length, paddings))
    begins, count = _tile_begins(at, length, KEYS, KEYS)
    begins = begins & valid

    is_public = is_public & begins
    last = tl.load(key_index_ptr + slots + count - 1, mask=is_key & begins, other=0)
    after_last, _ = _after(tokens_ptr, last, is_public, field)
    late_begin = tl.load(late_ptr + token, mask=is_public, other=0)
    late_end = tl.load(late_ptr + after_last, mask=is_public, other=0)
    reader_begin = _readers_before(tokens_ptr, after, is_public, field, ISOLATED)
    reader_full = _readers_before(tokens_ptr, after_last, is_public, field, ISOLATED)
    reader_end = _readers_before(tokens_ptr, document_end, is_public, field, ISOLATED)
    readers = reader_end - _readers_before(tokens_ptr, document_begin, is_public, field, ISOLATED)

    draft_ptr = drafts_ptr + slots
    tl.store(draft_ptr + 1 * field, slots, mask=begins)
    tl.store(draft_ptr + 2 * field, count, mask=begins)
    tl.store(draft_ptr + 3 * field, tl.where(is_private, token, 0), mask=begins)
    tl.store(draft_ptr + 4 * field, tl.where(is_private, last, 0), mask=begins)
    tl.store(draft_ptr + 5 * field, tl.where(is_private, after, 0), mask=begins)
    tl.store(draft_ptr + 6 * field, late_begin, mask=begins)
    tl.store(draft_ptr + 7 * field, late_end, mask=begins)
    tl.store(draft_ptr + 8 * field, reader_begin, mask=begins)
    tl.store(draft_ptr + 9 * field, reader_full, mask=begins)
    tl.store(draft_ptr + 10 * field, tl.maximum(reader_end, reader_full), mask=begins)
    return begins, tl.where(is_private, run_end - run_begin, readers)


@triton.jit
def _weight(begins, longest, WEIGHTS: tl.constexpr, LIGHTEST: tl.constexpr):
    """The weight of each tile, as in tiles.py; 0 where none begins."""
    quarters = longest.to(tl.float32).to(tl.int32, bitcast=True) >> 21
    return tl.where(begins, tl.minimum(tl.maximum(quarters - LIGHTEST, 0), WEIGHTS - 2) + 1, 0)


@triton.jit
def _ranked(weight, BLOCK: tl.constexpr):
    """The lanes sorted by weight and number: (weight, how many lanes of that weight come before, lane)."""
    lane = tl.arange(0, BLOCK)
    sorted_lanes = tl.sort(weight * BLOCK + lane)
    weight = sorted_lanes // BLOCK
    differs = weight != tl.gather(weight, tl.maximum(lane - 1, 0), 0)
    return weight, lane - _latest(lane, differs, 0), sorted_lanes % BLOCK


@triton.jit(do_not_specialize=["num_tokens", "chunk"])
def draft_kernel(
    tokens_ptr, row_index_ptr, key_index_ptr, after_ptr, row_drafts_ptr, key_drafts_ptr, weights_ptr, num_tokens, chunk,
    ISOLATED: tl.constexpr, ROWS: tl.constexpr, SMALL_ROWS: tl.constexpr, KEYS: tl.constexpr,
    WEIGHTS: tl.constexpr, LIGHTEST: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the tiles that begin in one chunk of slots, of rows (second axis of the grid 0) or keys (1).

    A draft [columns + 1, N + 1] int32 has at each slot a tile's rank times WEIGHTS plus its weight, and then its columns.
    The rank counts the tiles of the same weight that begin before it in the chunk. weights_ptr [2, CHUNKS, WEIGHTS] int32
    gets how many there are in all.
    """
    of_keys = tl.program_id(1)
    first = tl.program_id(0) * chunk
    weights = tl.arange(0, WEIGHTS)
    counts = tl.zeros([WEIGHTS], tl.int32)
    drafts_ptr = row_drafts_ptr
    if of_keys:
        drafts_ptr = key_drafts_ptr
    for start in range(first, tl.minimum(first + chunk, num_tokens), BLOCK):
        slots = start + tl.arange(0, BLOCK)
        if of_keys:
            begins, longest = _draft_keys(
                tokens_ptr, key_index_ptr, after_ptr, drafts_ptr, slots, num_tokens, ISOLATED, KEYS
            )
        else:
            begins, longest = _draft_rows(
                tokens_ptr, row_index_ptr, drafts_ptr, slots, num_tokens, ISOLATED, ROWS, SMALL_ROWS
            )
        weight = _weight(begins, longest, WEIGHTS, LIGHTEST)
        weight_by_rank, rank, lane = _ranked(weight, BLOCK)
        rank += tl.gather(counts, weight_by_rank, 0)
        tl.store(drafts_ptr + start + lane, rank * WEIGHTS + weight_by_rank, mask=start + lane < num_tokens)
        counts += tl.histogram(weight, WEIGHTS)
    tl.store(weights_ptr + (of_keys * CHUNKS + tl.program_id(0)) * WEIGHTS + weights, counts)


@triton.jit
def _places(weights_ptr, this, num_chunks, WEIGHTS: tl.constexpr, STEP: tl.constexpr):
    """[WEIGHTS] each: tiles of greater weight, tiles of this weight before chunk `this`, tiles of this weight in all."""
    weights = tl.arange(0, WEIGHTS)
    before, total = tl.zeros([WEIGHTS], tl.int32), tl.zeros([WEIGHTS], tl.int32)
    for first in range(0, num_chunks, STEP):
        chunks = first + tl.arange(0, STEP)[:, None]
        counts = tl.load(weights_ptr + chunks * WEIGHTS + weights[None, :], mask=chunks < num_chunks, other=0)
        before += tl.sum(tl.where(chunks < this, counts, 0), 0)
        total += tl.sum(counts, 0)
    return tl.cumsum(total, 0, reverse=True) - total, before, total


@triton.jit
def _list_chunk(
    drafts_ptr, tiles_ptr, weights_ptr, this, num_tokens, chunk, num_chunks,
    BACKWARD: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the tiles of one chunk of slots in their places, and zeros in the chunk's part of the end of the list.

    Heavy tiles come first, those of one weight in the order of slots or, BACKWARD, against it.
    """
    field = tl.cast(num_tokens, tl.int64) + 1
    weights = tl.arange(0, WEIGHTS)
    greater, before, total = _places(weights_ptr, this, num_chunks, WEIGHTS, 64)
    num_tiles = tl.sum(tl.where(weights > 0, total, 0), 0)
    place_of_first = greater + (total - 1 - before if BACKWARD else before)
    first = this * chunk
    for start in range(first, tl.minimum(first + chunk, num_tokens), BLOCK):
        lane = tl.arange(0, BLOCK)
        slots = start + lane
        draft = tl.load(drafts_ptr + slots, mask=slots < num_tokens, other=0)
        weight, rank = draft % WEIGHTS, draft // WEIGHTS
        place = tl.gather(place_of_first, weight, 0)
        tile_ptr = tiles_ptr + (place - rank if BACKWARD else place + rank).to(tl.int64) * COLUMNS
        end_ptr = tiles_ptr + tl.cast(start, tl.int64) * COLUMNS
        for column in tl.static_range(COLUMNS):
            value = tl.load(drafts_ptr + (column + 1) * field + slots, mask=weight > 0, other=0)
            tl.store(tile_ptr + column, value, mask=weight > 0)
            at = column * BLOCK + lane
            slot = start + at // COLUMNS
            tl.store(end_ptr + at, 0, mask=(slot >= num_tiles) & (slot < num_tokens))


@triton.jit(do_not_specialize=["num_tokens", "chunk", "num_chunks"])
def list_kernel(
    row_drafts_ptr, key_drafts_ptr, row_tiles_ptr, key_tiles_ptr, weights_ptr, num_tokens, chunk, num_chunks,
    ROW_COLUMNS: tl.constexpr, KEY_COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the drafts of one chunk of slots, of rows (second axis of the grid 0) or keys (1), as tiles.

    row_tiles [N, ROW_COLUMNS] int32, key_tiles [N, KEY_COLUMNS] int32; drafts and weights as in `draft_kernel`.
    """
    # The last tile of a run of rows sees most keys, so those are listed from the end.
    if tl.program_id(1) == 0:
        _list_chunk(
            row_drafts_ptr, row_tiles_ptr, weights_ptr, tl.program_id(0), num_tokens, chunk, num_chunks,
            True, ROW_COLUMNS, WEIGHTS, BLOCK,
        )  # fmt: skip
    else:
        _list_chunk(
            key_drafts_ptr, key_tiles_ptr, weights_ptr + CHUNKS * WEIGHTS, tl.program_id(0), num_tokens, chunk, num_chunks,
            False, KEY_COLUMNS, WEIGHTS, BLOCK,
        )  # fmt: skip


def build_tiles_on_gpu(layout: VocoLayout, geometry: Geometry) -> TilePlan:
    """The tiles of a layout on its GPU, as `build_tiles` makes them there: uncut lists, int32.

    Four launches whatever the layout, without a host synchronisation, so that a CUDA graph may hold them. N is less than
    2**31; while they run, they need 112 bytes per token besides the plan.
    """
    n = layout.num_tokens
    row_tiles, key_tiles = _ints(layout, n, len(ROW_TILE)), _ints(layout, n, len(KEY_TILE))
    row_index, key_index, reader_index, late_index, after = (_ints(layout, n) for _ in range(5))
    plan = TilePlan(geometry, False, row_tiles, key_tiles, row_index, key_index, reader_index, late_index, after)
    if n == 0:
        return plan
    segment_ids, public, cu_seqlens = (x.contiguous() for x in (layout.segment_ids, layout.public, layout.cu_seqlens))
    tokens, chunks = _ints(layout, TOKEN_FIELDS, n + 1), _ints(layout, CHUNK_FIELDS, CHUNKS)
    row_drafts, key_drafts = _ints(layout, 1 + len(ROW_TILE), n + 1), _ints(layout, 1 + len(KEY_TILE), n + 1)
    weights = _ints(layout, 2, CHUNKS, WEIGHTS)
    chunk = BLOCK * triton.cdiv(n, BLOCK * CHUNKS)
    grid = triton.cdiv(n, chunk)
    sizes = {"CHUNKS": CHUNKS, "BLOCK": BLOCK, "num_warps": WARPS}
    with on_device(segment_ids):
        count_kernel[(grid,)](
            segment_ids, public, cu_seqlens, tokens, chunks, n, layout.num_documents,
            cu_seqlens.shape[0].bit_length(), chunk, **sizes,
        )  # fmt: skip
        index_kernel[(grid,)](
            segment_ids, public, tokens, chunks, row_index, key_index, reader_index, late_index, n, chunk, grid,
            ISOLATED=layout.isolated, **sizes,
        )  # fmt: skip
        draft_kernel[(grid, 2)](
            tokens, row_index, key_index, after, row_drafts, key_drafts, weights, n, chunk,
            ISOLATED=layout.isolated, ROWS=geometry.rows, SMALL_ROWS=geometry.small_rows, KEYS=geometry.keys,
            WEIGHTS=WEIGHTS, LIGHTEST=LIGHTEST, **sizes,
        )  # fmt: skip
        list_kernel[(grid, 2)](
            row_drafts, key_drafts, row_tiles, key_tiles, weights, n, chunk, grid,
            ROW_COLUMNS=len(ROW_TILE), KEY_COLUMNS=len(KEY_TILE), WEIGHTS=WEIGHTS, **sizes,
        )  # fmt: skip
    return plan


def _ints(layout: VocoLayout, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=layout.device)
