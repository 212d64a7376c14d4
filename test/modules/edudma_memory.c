// SPDX-License-Identifier: GPL-2.0
/*
 * edudma.ko: memory with known content, what the device makes of it, and lists of
 * scattered pages. Nothing here maps.
 */
#include <linux/gfp.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "edudma.h"

u32 new_seed(struct edu *e)
{
	e->seed += 0x10000;	/* lists fill page i with seed + i */
	return e->seed;
}

/* Byte i of a pattern; bytes of different patterns at one place are equal once in 256 times. */
static u8 pattern(u32 seed, u32 i)
{
	u32 x = (seed ^ i << 20) * 0x9e3779b1u + i * 0x85ebca6bu;

	x ^= x >> 15;
	return (x * 0x2c1b3c6du) >> 24;
}

void fill(void *memory, u32 bytes, u32 seed)
{
	u8 *p = memory;
	u32 i;

	for (i = 0; i < bytes; i++)
		p[i] = pattern(seed, i);
}

u8 *get_memory(struct edu *e, u32 order, u32 seed)
{
	u8 *memory = (u8 *)__get_free_pages(GFP_KERNEL, order);

	if (want(e, memory, "no memory"))
		fill(memory, PAGE_SIZE << order, seed);
	return memory;
}

void free_memory(u8 *memory, u32 order)
{
	free_pages((unsigned long)memory, order);
}

bool holds(struct edu *e, const u8 *memory, u32 total, u32 seed, u32 from, u32 bytes, u32 other,
	   u32 base)
{
	u32 i;

	for (i = 0; i < total; i++) {
		bool inside = i >= from && i - from < bytes;
		u8 byte = inside ? pattern(other, base + i - from) : pattern(seed, i);

		if (!want(e, memory[i] == byte, "byte %u of %u is %#x, not %#x: %s", i, total,
			  memory[i], byte,
			  inside ? "not what the device moved" : "changed by nobody who may"))
			return false;
	}
	return true;
}

bool usable(struct edu *e, dma_addr_t at, u64 bytes, unsigned long offset)
{
	return want(e, !dma_mapping_error(e->dev, at), "not mapped") &&
	       want(e, offset_in_page(at) == offset, "offset %#lx in the page became %#lx", offset,
		    offset_in_page(at)) &&
	       want(e, at <= dma_get_mask(e->dev) && bytes - 1 <= dma_get_mask(e->dev) - at,
		    "%llu bytes at %pad go beyond the mask", bytes, &at);
}

bool load_buffer(struct edu *e, u32 bytes, u32 seed)
{
	fill(e->in, bytes, seed);
	return edu_fetch(e, e->in_at, bytes);
}

/* What is in the device's buffer comes to e->out. */
static bool see_buffer(struct edu *e, u32 bytes)
{
	memset(e->out, 0, PAGE_SIZE);
	return edu_store(e, e->out_at, bytes);
}

bool sends(struct edu *e, dma_addr_t at, const void *content, u32 bytes)
{
	return edu_fetch(e, at, bytes) && see_buffer(e, bytes) &&
	       want(e, !memcmp(e->out, content, bytes),
		    "the device read something else than is there");
}

bool sends_not(struct edu *e, dma_addr_t at, const void *content, u32 bytes)
{
	const u8 *secret = content;
	u32 i, equal = 0;

	/* what a refused read leaves in the buffer is the device's affair, but for this */
	if (!load_buffer(e, bytes, new_seed(e)) || !edu_fetch(e, at, bytes) ||
	    !see_buffer(e, bytes))
		return false;
	for (i = 0; i < bytes; i++)
		equal += e->out[i] == secret[i];
	return want(e, equal < bytes / 8, "the device read %u of %u bytes that it may not reach",
		    equal, bytes);
}

bool receive(struct edu *e, dma_addr_t at, u32 bytes, u32 seed)
{
	return load_buffer(e, bytes, seed) && edu_store(e, at, bytes);
}

bool list_make(struct edu *e, struct list *list, u32 count, bool odd)
{
	struct scatterlist *sg;
	u32 state = 12345, i;

	memset(list, 0, sizeof(*list));
	list->pages = kvcalloc(count, sizeof(*list->pages), GFP_KERNEL);
	if (!want(e, list->pages, "no memory"))
		return false;
	list->seed = new_seed(e);
	for (i = 0; i < count; i++) {
		list->pages[i] = alloc_page(GFP_KERNEL);
		if (!list->pages[i])
			break;
	}
	list->count = i;
	if (!want(e, i == count && !sg_alloc_table(&list->table, count, GFP_KERNEL), "no memory")) {
		list_free(list);
		return false;
	}
	for (i = count - 1; i; i--) {
		state = state * 1664525 + 1013904223;
		swap(list->pages[i], list->pages[(state >> 8) % (i + 1)]);
	}
	for_each_sg(list->table.sgl, sg, count, i) {
		u32 offset = odd ? (i * 37) % 999 | 1 : 0;
		u32 bytes = odd ? (i * 101) % 2999 | 1 : PAGE_SIZE;

		sg_set_page(sg, list->pages[i], bytes, offset);
		fill(page_address(list->pages[i]), PAGE_SIZE, list->seed + i);
	}
	return true;
}

void list_free(struct list *list)
{
	u32 i;

	for (i = 0; i < list->count; i++)
		__free_page(list->pages[i]);
	sg_free_table(&list->table);
	kvfree(list->pages);
	memset(list, 0, sizeof(*list));
}

struct scatterlist *list_entry_of(struct list *list, u32 i)
{
	struct scatterlist *sg = list->table.sgl;

	while (i--)
		sg = sg_next(sg);
	return sg;
}

bool list_usable(struct edu *e, struct list *list)
{
	u64 boundary = dma_get_seg_boundary(e->dev);
	u64 entries = 0, segments = 0;
	struct scatterlist *sg;
	u32 i;

	if (!want(e, list->segments > 0 && list->segments <= list->count,
		  "%u entries became %d segments", list->count, list->segments))
		return false;
	for_each_sg(list->table.sgl, sg, list->count, i)
		entries += sg->length;
	for_each_sg(list->table.sgl, sg, list->segments, i) {
		u64 at = sg_dma_address(sg), bytes = sg_dma_len(sg);

		if (!want(e, bytes && bytes <= dma_get_max_seg_size(e->dev),
			  "segment %u is %llu bytes", i, bytes) ||
		    !want(e, !((at ^ (at + bytes - 1)) & ~boundary),
			  "segment %u crosses a boundary", i) ||
		    !usable(e, at, bytes, offset_in_page(at)))
			return false;
		segments += bytes;
	}
	if (!want(e, entries == segments, "%llu bytes became %llu", entries, segments))
		return false;
	for (i = 0; i < list->count; i++) {
		if (!usable(e, list_at(e, list, i), list_entry_of(list, i)->length,
			    list_entry_of(list, i)->offset))
			return false;
	}
	return true;
}

/* By counting bytes, as a driver that takes a list for a stream does: segments are not entries. */
dma_addr_t list_at(struct edu *e, struct list *list, u32 index)
{
	struct scatterlist *sg;
	u64 before = 0;
	u32 bytes, i;

	for_each_sg(list->table.sgl, sg, index, i)
		before += sg->length;
	bytes = sg->length;
	for_each_sg(list->table.sgl, sg, list->segments, i) {
		if (before >= sg_dma_len(sg)) {
			before -= sg_dma_len(sg);
			continue;
		}
		if (!want(e, sg_dma_len(sg) - before >= bytes, "entry %u is in two pieces", index))
			return DMA_MAPPING_ERROR;
		return sg_dma_address(sg) + before;
	}
	want(e, false, "entry %u is in no segment", index);
	return DMA_MAPPING_ERROR;
}

bool list_holds(struct edu *e, struct list *list, const struct list *from, const u32 *moved,
		u32 moves)
{
	struct scatterlist *sg;
	u32 i, m;

	for_each_sg(list->table.sgl, sg, list->count, i) {
		u32 bytes = 0;

		for (m = 0; m < moves; m++) {
			if (moved[m] == i)
				bytes = sg->length;
		}
		if (!holds(e, page_address(list->pages[i]), PAGE_SIZE, list->seed + i, sg->offset,
			   bytes, bytes ? from->seed + i : 0, sg->offset)) {
			want(e, false, "(entry %u)", i);
			return false;
		}
	}
	return true;
}
