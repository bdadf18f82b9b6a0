// SPDX-License-Identifier: GPL-2.0-only
/*
 * Marks in a bitmap per disk which 4 KiB blocks requests may change: when a request is issued to
 * the driver, and again when it, or a part of it, completes. Both are needed:
 * - Completion, because a swap of the bitmaps may fall between the two: the closed bitmap then has
 *   the block although its data arrives only later; the mark at completion, which comes before the
 *   writer hears of it, puts the block into the next epoch too. Failed requests are marked as
 *   well: they may have changed the medium.
 * - Issue, because a kernel has been seen to run a soft interrupt in which no tracepoint at all
 *   fires: about one completion in 50,000 was told to nobody. No issue was. For a request whose
 *   completion stays untold and that a swap falls into, `flights` says what it may still change.
 *
 * The tracepoints block:block_rq_issue and block:block_rq_complete are used in their BTF form,
 * which hands out the request itself: the operation is read as a number instead of guessed from
 * the letters of `rwbs` (where `N` is a write-zeroes on one kernel and a harmless pass-through
 * command on the next), and a discard of several separate ranges is seen range by range, where
 * the text form tells a first sector and a sum.
 *
 * What cannot be placed (past the end of the bitmap, a pass-through write, a zone command) adds
 * to the disk's `lost` counter, so that nothing is missed in silence.
 */
#include <linux/bpf.h>
#include <stdbool.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define SECTORS_PER_BLOCK_SHIFT 3 /* sectors of 512 bytes, blocks of 4096 */
#define BLOCKS_PER_WORD_SHIFT 6
#define BLOCK_IN_WORD 63
#define WORDS_MAX (1ULL << 32)

#define DISKS_MAX 256   /* tracked disks of one machine */
#define FLIGHTS_MAX 16384 /* requests of all disks that a driver works at */
#define RANGES_MAX 4096 /* ranges of one discard; drivers allow 256 */

/* enum req_op: values that no kernel since 4.10 has changed; odd ones send data or change state */
#define OPERATION_MASK 0xff
#define OPERATION_WRITE 1
#define OPERATION_DISCARD 3
#define OPERATION_SECURE_ERASE 5
#define OPERATION_WRITE_ZEROES 9

#define RELOCATED __attribute__((preserve_access_index))

struct gendisk {
	int major;
	int first_minor;
} RELOCATED;

struct request_queue {
	struct gendisk *disk;
} RELOCATED;

struct bvec_iter {
	__u64 bi_sector;
	__u32 bi_size;
} RELOCATED;

struct bio {
	struct bio *bi_next;
	struct bvec_iter bi_iter;
} RELOCATED;

struct request {
	struct request_queue *q;
	__u32 cmd_flags;
	__u32 __data_len;
	__u64 __sector;
	struct bio *bio;
} RELOCATED;

/* One bit a block, block b being bit b % 64 of word b / 64. The agent makes them in the disk's size. */
struct bitmap {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
};

/* Device number as in the kernel, (major << 20) | minor -> the bitmap of the running epoch. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, DISKS_MAX);
	__type(key, __u32);
	__array(values, struct bitmap);
} disks SEC(".maps");

/* Device number -> how many changes could not be placed in a bitmap. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, DISKS_MAX);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

/*
 * Requests that have been issued and not been told to have completed: address of the request -> what
 * it may change. A swap of the bitmaps counts their blocks to both epochs, so that a completion
 * which is told to nobody does not matter. A request's memory is used again for later ones, so an
 * entry that nobody removed is replaced before long.
 */
struct flight {
	__u32 dev;
	__u32 reserved;
	__u64 first_block;
	__u64 last_block; /* within */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FLIGHTS_MAX);
	__type(key, __u64);
	__type(value, struct flight);
} flights SEC(".maps");

struct span {
	void *bitmap;
	__u64 first_block;
	__u64 last_block; /* within */
	bool lost;
};

struct walk {
	void *bitmap;
	struct bio *bio;
	__u64 first_block;
	__u64 last_block;
	bool lost;
};

static long mark_word(__u32 step, struct span *span)
{
	__u64 word = (span->first_block >> BLOCKS_PER_WORD_SHIFT) + step;
	__u64 mask = ~0ULL;
	__u64 *bits;
	__u32 key = word;

	if (step == 0)
		mask <<= span->first_block & BLOCK_IN_WORD;
	if (word == span->last_block >> BLOCKS_PER_WORD_SHIFT)
		mask &= ~0ULL >> (BLOCK_IN_WORD - (span->last_block & BLOCK_IN_WORD));
	bits = word < WORDS_MAX ? bpf_map_lookup_elem(span->bitmap, &key) : NULL;
	if (!bits) {
		span->lost = true;
		return 1;
	}
	/* A busy block is marked again and again: look before taking the cache line. */
	if ((*bits & mask) != mask)
		__sync_fetch_and_or(bits, mask);
	return 0;
}

/* Mark every block that the sectors touch; false if some lie past the end. */
static __always_inline bool mark(void *bitmap, __u64 sector, __u64 bytes)
{
	__u64 sectors = (bytes + 511) >> 9;
	struct span span = {
		.bitmap = bitmap,
		.first_block = sector >> SECTORS_PER_BLOCK_SHIFT,
		.last_block = (sector + sectors - 1) >> SECTORS_PER_BLOCK_SHIFT,
	};
	__u64 words;

	if (sectors == 0) /* a pure flush */
		return true;
	words = (span.last_block >> BLOCKS_PER_WORD_SHIFT) -
		(span.first_block >> BLOCKS_PER_WORD_SHIFT) + 1;
	if (words == 1)
		mark_word(0, &span);
	else if (bpf_loop(words, mark_word, &span, 0) < 0)
		return false;
	return !span.lost;
}

static long mark_range(__u32 step, struct walk *walk)
{
	struct bio *bio = walk->bio;
	__u64 first_block, last_block, sector;

	if (!bio)
		return 1;
	sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
	first_block = sector >> SECTORS_PER_BLOCK_SHIFT;
	last_block = (sector + (BPF_CORE_READ(bio, bi_iter.bi_size) >> 9) - 1) >>
		     SECTORS_PER_BLOCK_SHIFT;
	if (first_block < walk->first_block)
		walk->first_block = first_block;
	if (last_block > walk->last_block)
		walk->last_block = last_block;
	if (!mark(walk->bitmap, sector, BPF_CORE_READ(bio, bi_iter.bi_size)))
		walk->lost = true;
	walk->bio = BPF_CORE_READ(bio, bi_next);
	return 0;
}

/* Mark each range of a discard; what they span goes to `flight`. */
static __always_inline bool mark_discard(void *bitmap, struct request *request,
					 struct flight *flight)
{
	struct walk walk = {
		.bitmap = bitmap,
		.bio = BPF_CORE_READ(request, bio),
		.first_block = ~0ULL,
	};

	if (bpf_loop(RANGES_MAX, mark_range, &walk, 0) < 0)
		return false;
	flight->first_block = walk.first_block;
	flight->last_block = walk.last_block;
	return !walk.lost && !walk.bio;
}

static __always_inline int mark_request(struct request *request, unsigned int bytes, bool issued)
{
	__u32 operation = request->cmd_flags & OPERATION_MASK;
	__u64 address = (__u64)request;
	struct flight flight = {};
	struct gendisk *disk;
	void *bitmap;
	__u64 *count;
	__u32 dev;
	bool whole;

	if (!(operation & 1)) /* reads, flushes */
		return 0;
	disk = request->q->disk;
	if (!disk)
		return 0;
	dev = (__u32)disk->major << 20 | (__u32)disk->first_minor;
	bitmap = bpf_map_lookup_elem(&disks, &dev);
	if (!bitmap)
		return 0;

	if (operation == OPERATION_DISCARD)
		whole = mark_discard(bitmap, request, &flight);
	else if (operation == OPERATION_WRITE || operation == OPERATION_WRITE_ZEROES ||
		 operation == OPERATION_SECURE_ERASE) {
		flight.first_block = request->__sector >> SECTORS_PER_BLOCK_SHIFT;
		flight.last_block = (request->__sector + ((__u64)bytes >> 9) - 1) >>
				    SECTORS_PER_BLOCK_SHIFT;
		whole = mark(bitmap, request->__sector, bytes);
	} else {
		whole = false;
	}
	if (!bytes) {
		/* a pure flush: nothing is under way */
	} else if (issued) {
		flight.dev = dev;
		if (bpf_map_update_elem(&flights, &address, &flight, BPF_ANY))
			whole = false;
	} else if (bytes >= request->__data_len) { /* all of it, not a first part */
		bpf_map_delete_elem(&flights, &address);
	}
	if (whole)
		return 0;
	count = bpf_map_lookup_elem(&lost, &dev);
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}

/*
 * Three copies of each, all attached. Since 6.1 the kernel skips a program that is already running
 * on the same CPU, so a request in an interrupt that hits the program in mid-run would be missed. A
 * request is handled in a task (with preemption off), a soft or a hard interrupt: two others at
 * most are interrupted below it, each of them inside one copy at most, so one copy is free for it.
 */
#define COPY(number)                                                                           \
	SEC("tp_btf/block_rq_issue")                                                           \
	int BPF_PROG(issue##number, struct request *request)                                   \
	{                                                                                      \
		return mark_request(request, request->__data_len, true);                       \
	}                                                                                      \
	SEC("tp_btf/block_rq_complete")                                                        \
	int BPF_PROG(complete##number, struct request *request, int error, unsigned int bytes) \
	{                                                                                      \
		return mark_request(request, bytes, false);                                    \
	}

COPY(0)
COPY(1)
COPY(2)

char LICENSE[] SEC("license") = "GPL";
