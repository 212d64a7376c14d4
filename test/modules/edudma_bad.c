// SPDX-License-Identifier: GPL-2.0
/*
 * edudma.ko: what must not work, and what happens when the host says no. The groups
 * `permissions' and `misuse' need nothing. The others need a host that is told to fail:
 * `refused' with every map failing, `retried' with calls that succeed when they are made
 * again, `kept' with every unmap failing and `again' after that has ended, `delayed' with
 * calls that take 50 ms.
 */
#include <linux/dmapool.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>

#include "edudma.h"

/* ---- what a device may not reach ---- */

static void write_to_read_only(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e);
	u8 *memory = get_memory(e, 0, seed);
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory + 100, 1000, DMA_TO_DEVICE);
	if (usable(e, at, 1000, 100)) {
		receive(e, at, 1000, new_seed(e));
		holds(e, memory, PAGE_SIZE, seed, 0, 0, 0, 0);
		sends(e, at, memory + 100, 1000);
		dma_unmap_single(e->dev, at, 1000, DMA_TO_DEVICE);
	}
	free_memory(memory, 0);
}

static void read_of_write_only(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e);
	u8 *memory = get_memory(e, 0, seed);
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory + 100, 1000, DMA_FROM_DEVICE);
	if (usable(e, at, 1000, 100)) {
		sends_not(e, at, memory + 100, 1000);
		receive(e, at, 1000, other);
		dma_unmap_single(e->dev, at, 1000, DMA_FROM_DEVICE);
		holds(e, memory, PAGE_SIZE, seed, 100, 1000, other, 0);
	}
	free_memory(memory, 0);
}

/* The device goes on with an address after its unmap: one write, one read (edu.test.ts). */
static void after_unmap(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e);
	u8 *memory = get_memory(e, 0, seed);
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory, PAGE_SIZE, DMA_BIDIRECTIONAL);
	if (usable(e, at, PAGE_SIZE, 0)) {
		receive(e, at, 1000, other);
		dma_unmap_single(e->dev, at, PAGE_SIZE, DMA_BIDIRECTIONAL);
		receive(e, at + 2000, 1000, new_seed(e));
		sends_not(e, at, memory, 1000);
		holds(e, memory, PAGE_SIZE, seed, 0, 1000, other, 0);
	}
	free_memory(memory, 0);
}

static void after_unmap_sg(struct edu *e, unsigned long arg)
{
	struct list list;
	dma_addr_t at;

	if (!list_make(e, &list, 64, true))
		return;
	list.segments = dma_map_sg(e->dev, list.table.sgl, list.count, DMA_FROM_DEVICE);
	if (want(e, list.segments, "not mapped")) {
		at = list_at(e, &list, 63);
		dma_unmap_sg(e->dev, list.table.sgl, list.count, DMA_FROM_DEVICE);
		if (at != DMA_MAPPING_ERROR)
			receive(e, at, list_entry_of(&list, 63)->length, new_seed(e));
		list_holds(e, &list, NULL, NULL, 0);
	}
	list_free(&list);
}

/*
 * Of four pages in a row one is mapped, and the device writes to all: before, in, behind
 * it, and across its end. The pages around it stay as they are, byte for byte.
 */
static void neighbours(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e), third = new_seed(e);
	u8 *memory = get_memory(e, 2, seed);
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_page(e->dev, virt_to_page(memory), PAGE_SIZE, PAGE_SIZE, DMA_FROM_DEVICE);
	if (usable(e, at, PAGE_SIZE, 0)) {
		receive(e, at, 3000, other);
		if (at >= PAGE_SIZE)
			edu_store(e, at - PAGE_SIZE, 3000);
		edu_store(e, at + PAGE_SIZE, 3000);
		dma_sync_single_for_cpu(e->dev, at, PAGE_SIZE, DMA_FROM_DEVICE);
		holds(e, memory, 4 * PAGE_SIZE, seed, PAGE_SIZE, 3000, other, 0);
		dma_sync_single_for_device(e->dev, at, PAGE_SIZE, DMA_FROM_DEVICE);
		edu_store(e, at + 3500, 3000);
		dma_unmap_page(e->dev, at, PAGE_SIZE, DMA_FROM_DEVICE);
		/* what came before the end of the page is the device's affair */
		fill(memory + PAGE_SIZE, PAGE_SIZE, third);
		holds(e, memory, 4 * PAGE_SIZE, seed, PAGE_SIZE, PAGE_SIZE, third, 0);
	}
	free_memory(memory, 2);
}

/* ---- what a driver may not do: refused, and the right call works afterwards ---- */

static void double_unmap(struct edu *e, unsigned long arg)
{
	u8 *memory = get_memory(e, 0, new_seed(e));
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory, 1000, DMA_TO_DEVICE);
	if (usable(e, at, 1000, 0)) {
		dma_unmap_single(e->dev, at, 1000, DMA_TO_DEVICE);
		dma_unmap_single(e->dev, at, 1000, DMA_TO_DEVICE);
	}
	at = dma_map_single(e->dev, memory, 1000, DMA_TO_DEVICE);
	if (usable(e, at, 1000, 0)) {
		sends(e, at, memory, 1000);
		dma_unmap_single(e->dev, at, 1000, DMA_TO_DEVICE);
	}
	free_memory(memory, 0);
}

/* Two wrong unmaps of a mapping of two pages: it stays whole, until the right one. */
static void wrong_unmap(struct edu *e, u32 offset, u32 bytes, u32 other_offset, u32 other_bytes)
{
	u32 seed = new_seed(e), first = new_seed(e);
	u8 *memory = get_memory(e, 1, seed);
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory, 2 * PAGE_SIZE, DMA_FROM_DEVICE);
	if (usable(e, at, 2 * PAGE_SIZE, 0)) {
		dma_unmap_single(e->dev, at + offset, bytes, DMA_FROM_DEVICE);
		dma_unmap_single(e->dev, at + other_offset, other_bytes, DMA_FROM_DEVICE);
		receive(e, at + PAGE_SIZE - 1000, 2000, first);
		dma_unmap_single(e->dev, at, 2 * PAGE_SIZE, DMA_FROM_DEVICE);
		receive(e, at + PAGE_SIZE - 2000, 2500, new_seed(e));	/* refused */
		holds(e, memory, 2 * PAGE_SIZE, seed, PAGE_SIZE - 1000, 2000, first, 0);
	}
	free_memory(memory, 1);
}

static void wrong_size(struct edu *e, unsigned long arg)
{
	wrong_unmap(e, 0, PAGE_SIZE, 0, 3 * PAGE_SIZE);
}

static void wrong_start(struct edu *e, unsigned long arg)
{
	wrong_unmap(e, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, 2 * PAGE_SIZE);
}

/* Above all masks that there are here, and above what any IOMMU translates. */
static void never_mapped(struct edu *e, unsigned long arg)
{
	dma_unmap_single(e->dev, 0xfffffff000ull, 1000, DMA_TO_DEVICE);
	dma_unmap_single(e->dev, 0xffffffffff000000ull, PAGE_SIZE, DMA_TO_DEVICE);
}

static void unmap_zero(struct edu *e, unsigned long arg)
{
	u8 *memory = get_memory(e, 0, new_seed(e));
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory, 1000, DMA_TO_DEVICE);
	if (usable(e, at, 1000, 0)) {
		dma_unmap_single(e->dev, at, 0, DMA_TO_DEVICE);
		sends(e, at, memory, 1000);
		dma_unmap_single(e->dev, at, 1000, DMA_TO_DEVICE);
	}
	free_memory(memory, 0);
}

/* A list that is two ranges at the host. */
static void double_unmap_sg(struct edu *e, unsigned long arg)
{
	struct list list;
	u32 round;

	if (!list_make(e, &list, 300, true))
		return;
	for (round = 0; round < 2; round++) {
		list.segments = dma_map_sg(e->dev, list.table.sgl, list.count, DMA_TO_DEVICE);
		if (!want(e, list.segments, "not mapped"))
			break;
		if (round)
			sends(e, list_at(e, &list, 299), sg_virt(list_entry_of(&list, 299)),
			      list_entry_of(&list, 299)->length);
		dma_unmap_sg(e->dev, list.table.sgl, list.count, DMA_TO_DEVICE);
		if (!round)
			dma_unmap_sg(e->dev, list.table.sgl, list.count, DMA_TO_DEVICE);
	}
	list_free(&list);
}

static void wrong_nents(struct edu *e, unsigned long arg)
{
	struct list list;

	if (!list_make(e, &list, 64, true))
		return;
	list.segments = dma_map_sg(e->dev, list.table.sgl, list.count, DMA_TO_DEVICE);
	if (want(e, list.segments, "not mapped")) {
		dma_unmap_sg(e->dev, list.table.sgl, list.count - 1, DMA_TO_DEVICE);
		sends(e, list_at(e, &list, 2), sg_virt(list_entry_of(&list, 2)),
		      list_entry_of(&list, 2)->length);
		dma_unmap_sg(e->dev, list.table.sgl, list.count, DMA_TO_DEVICE);
	}
	list_free(&list);
}

/* A free that is refused frees nothing: the device still reaches the memory. */
static void coherent_wrong_free(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), bytes = 2 * PAGE_SIZE;
	dma_addr_t at;
	u8 *memory = dma_alloc_coherent(e->dev, bytes, &at, GFP_KERNEL);

	if (!want(e, memory, "no memory"))
		return;
	dma_free_coherent(e->dev, 4 * PAGE_SIZE, memory, at);
	dma_free_coherent(e->dev, bytes, memory, at + PAGE_SIZE);
	receive(e, at + 3000, 2000, seed);
	holds(e, memory + 3000, 2000, seed, 0, 0, 0, 0);
	dma_free_coherent(e->dev, bytes, memory, at);
}

/* The second free finds no mapping and leaves the pages to those who have them now. */
static void coherent_double_free(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e);
	struct page *page;
	dma_addr_t at;
	u8 *memory;

	page = dma_alloc_pages(e->dev, PAGE_SIZE, &at, DMA_BIDIRECTIONAL, GFP_KERNEL);
	if (!want(e, page, "no memory"))
		return;
	get_page(page);		/* so that it is still ours to look at after it was freed */
	dma_free_pages(e->dev, PAGE_SIZE, page, at, DMA_BIDIRECTIONAL);
	want(e, page_count(page) == 1, "%d users after the free", page_count(page));
	dma_free_pages(e->dev, PAGE_SIZE, page, at, DMA_BIDIRECTIONAL);
	if (!want(e, page_count(page) == 1, "%d users after the second free", page_count(page)))
		return;
	memory = page_address(page);
	fill(memory, PAGE_SIZE, seed);
	receive(e, at, 1000, new_seed(e));	/* refused */
	holds(e, memory, PAGE_SIZE, seed, 0, 0, 0, 0);
	put_page(page);
}

/* ---- one mapping of each kind, where the host fails ---- */

/*
 * make() gives NULL, or the API's way to say no, in words. `memory' is what the device
 * reaches at `at'. undo() is the API's counterpart; drop() frees what is the driver's own.
 */
struct kind {
	const char *(*make)(struct edu *e, struct made *m);
	void (*undo)(struct edu *e, struct made *m);
	void (*drop)(struct made *m);
	const char *refusal;
};

static const char *make_single(struct edu *e, struct made *m)
{
	m->memory = get_memory(e, 0, new_seed(e));
	m->bytes = 1000;
	if (!m->memory)
		return "no memory";
	m->at = dma_map_single(e->dev, m->memory, m->bytes, DMA_BIDIRECTIONAL);
	return dma_mapping_error(e->dev, m->at) ? "DMA_MAPPING_ERROR" : NULL;
}

static void undo_single(struct edu *e, struct made *m)
{
	dma_unmap_single(e->dev, m->at, m->bytes, DMA_BIDIRECTIONAL);
}

static void drop_single(struct made *m)
{
	free_memory(m->memory, 0);
}

static const char *make_page(struct edu *e, struct made *m)
{
	m->memory = get_memory(e, 2, new_seed(e));
	m->bytes = 3 * PAGE_SIZE;
	if (!m->memory)
		return "no memory";
	m->at = dma_map_page(e->dev, virt_to_page(m->memory), 0, m->bytes, DMA_FROM_DEVICE);
	return dma_mapping_error(e->dev, m->at) ? "DMA_MAPPING_ERROR" : NULL;
}

static void undo_page(struct edu *e, struct made *m)
{
	dma_unmap_page(e->dev, m->at, m->bytes, DMA_FROM_DEVICE);
}

static void drop_page(struct made *m)
{
	free_memory(m->memory, 2);
}

/* The last entry stands for a mapped list. */
static const char *show_last(struct edu *e, struct made *m)
{
	struct scatterlist *last = list_entry_of(&m->list, m->list.count - 1);

	m->at = list_at(e, &m->list, m->list.count - 1);
	m->memory = sg_virt(last);
	m->bytes = last->length;
	return NULL;
}

static const char *make_sg(struct edu *e, struct made *m, u32 count)
{
	if (!list_make(e, &m->list, count, true))
		return "no memory";
	m->list.segments = dma_map_sg(e->dev, m->list.table.sgl, count, DMA_BIDIRECTIONAL);
	return m->list.segments ? show_last(e, m) : "0 segments";
}

static const char *make_sg_1(struct edu *e, struct made *m)
{
	return make_sg(e, m, 1);
}

static const char *make_sg_64(struct edu *e, struct made *m)
{
	return make_sg(e, m, 64);
}

static const char *make_sg_1000(struct edu *e, struct made *m)
{
	return make_sg(e, m, 1000);
}

static void undo_sg(struct edu *e, struct made *m)
{
	dma_unmap_sg(e->dev, m->list.table.sgl, m->list.count, DMA_BIDIRECTIONAL);
}

static const char *make_sgtable(struct edu *e, struct made *m)
{
	int err;

	if (!list_make(e, &m->list, 64, true))
		return "no memory";
	err = dma_map_sgtable(e->dev, &m->list.table, DMA_BIDIRECTIONAL, DMA_ATTR_NO_WARN);
	m->list.segments = m->list.table.nents;
	return !err ? show_last(e, m) : err == -ENOMEM ? "-ENOMEM" : "another errno";
}

static void undo_sgtable(struct edu *e, struct made *m)
{
	dma_unmap_sgtable(e->dev, &m->list.table, DMA_BIDIRECTIONAL, 0);
}

static void drop_list(struct made *m)
{
	list_free(&m->list);
}

static const char *make_coherent(struct edu *e, struct made *m)
{
	m->bytes = 3 * PAGE_SIZE;
	m->memory = dma_alloc_coherent(e->dev, m->bytes, &m->at, GFP_KERNEL);
	return m->memory ? NULL : "NULL";
}

static void undo_coherent(struct edu *e, struct made *m)
{
	dma_free_coherent(e->dev, m->bytes, m->memory, m->at);
}

static const char *make_attrs(struct edu *e, struct made *m)
{
	m->bytes = PAGE_SIZE;
	m->memory = dma_alloc_attrs(e->dev, m->bytes, &m->at, GFP_KERNEL, DMA_ATTR_NO_WARN);
	return m->memory ? NULL : "NULL";
}

static void undo_attrs(struct edu *e, struct made *m)
{
	dma_free_attrs(e->dev, m->bytes, m->memory, m->at, DMA_ATTR_NO_WARN);
}

static const char *make_pages(struct edu *e, struct made *m)
{
	m->bytes = 2 * PAGE_SIZE;
	m->page = dma_alloc_pages(e->dev, m->bytes, &m->at, DMA_FROM_DEVICE, GFP_KERNEL);
	if (!m->page)
		return "NULL";
	m->memory = page_address(m->page);
	return NULL;
}

static void undo_pages(struct edu *e, struct made *m)
{
	dma_free_pages(e->dev, m->bytes, m->page, m->at, DMA_FROM_DEVICE);
}

static const char *make_noncoherent(struct edu *e, struct made *m)
{
	m->bytes = 2 * PAGE_SIZE;
	m->memory = dma_alloc_noncoherent(e->dev, m->bytes, &m->at, DMA_BIDIRECTIONAL, GFP_KERNEL);
	return m->memory ? NULL : "NULL";
}

static void undo_noncoherent(struct edu *e, struct made *m)
{
	dma_free_noncoherent(e->dev, m->bytes, m->memory, m->at, DMA_BIDIRECTIONAL);
}

static const char *make_noncontiguous(struct edu *e, struct made *m)
{
	m->bytes = 4 * PAGE_SIZE;
	m->sgt = dma_alloc_noncontiguous(e->dev, m->bytes, DMA_BIDIRECTIONAL, GFP_KERNEL, 0);
	if (!m->sgt)
		return "NULL";
	m->memory = sg_virt(m->sgt->sgl);
	m->at = sg_dma_address(m->sgt->sgl);
	return NULL;
}

static void undo_noncontiguous(struct edu *e, struct made *m)
{
	dma_free_noncontiguous(e->dev, m->bytes, m->sgt, DMA_BIDIRECTIONAL);
}

static const char *make_pool(struct edu *e, struct made *m)
{
	m->bytes = 96;
	m->pool = dma_pool_create("edudma", e->dev, m->bytes, 32, 0);
	if (!m->pool)
		return "no pool";
	m->memory = dma_pool_alloc(m->pool, GFP_KERNEL, &m->at);
	return m->memory ? NULL : "NULL";
}

static void undo_pool(struct edu *e, struct made *m)
{
	dma_pool_free(m->pool, m->memory, m->at);
}

static void drop_pool(struct made *m)
{
	dma_pool_destroy(m->pool);
}

static void drop_nothing(struct made *m)
{
}

enum {
	SINGLE, PAGE, SG_1, SG_64, SG_1000, SGTABLE, COHERENT, ATTRS, PAGES, NONCOHERENT,
	NONCONTIGUOUS, POOL,
};

static const struct kind kinds[] = {
	[SINGLE] = { make_single, undo_single, drop_single, "DMA_MAPPING_ERROR" },
	[PAGE] = { make_page, undo_page, drop_page, "DMA_MAPPING_ERROR" },
	[SG_1] = { make_sg_1, undo_sg, drop_list, "0 segments" },
	[SG_64] = { make_sg_64, undo_sg, drop_list, "0 segments" },
	[SG_1000] = { make_sg_1000, undo_sg, drop_list, "0 segments" },
	[SGTABLE] = { make_sgtable, undo_sgtable, drop_list, "-ENOMEM" },
	[COHERENT] = { make_coherent, undo_coherent, drop_nothing, "NULL" },
	[ATTRS] = { make_attrs, undo_attrs, drop_nothing, "NULL" },
	[PAGES] = { make_pages, undo_pages, drop_nothing, "NULL" },
	[NONCOHERENT] = { make_noncoherent, undo_noncoherent, drop_nothing, "NULL" },
	[NONCONTIGUOUS] = { make_noncontiguous, undo_noncontiguous, drop_nothing, "NULL" },
	[POOL] = { make_pool, undo_pool, drop_pool, "NULL" },
};

/* The host refuses: the API says so, in its own way. */
static void refused(struct edu *e, unsigned long arg)
{
	const struct kind *kind = &kinds[arg];
	struct made m = { 0 };
	const char *answer = kind->make(e, &m);

	if (!want(e, answer, "mapped, though the host refused"))
		kind->undo(e, &m);
	else
		want(e, !strcmp(answer, kind->refusal), "the answer is %s, not %s", answer,
		     kind->refusal);
	kind->drop(&m);
}

/* As many allocations that fail as there is memory: none of them keeps any. */
static void refused_many(struct edu *e, unsigned long count)
{
	struct sysinfo before, after;
	dma_addr_t at;
	void *memory;

	si_meminfo(&before);
	while (count--) {
		memory = dma_alloc_coherent(e->dev, SZ_1M, &at, GFP_KERNEL);
		if (!want(e, !memory, "mapped, though the host refused"))
			dma_free_coherent(e->dev, SZ_1M, memory, at);
	}
	si_meminfo(&after);
	want(e, after.freeram + (SZ_64M >> PAGE_SHIFT) > before.freeram,
	     "%lu pages were free, now %lu", before.freeram, after.freeram);
}

/* The host asks for another try now and then: nobody notices. */
static void retried(struct edu *e, unsigned long arg)
{
	const struct kind *kind = &kinds[arg];
	struct made m = { 0 };
	u32 bytes, seed = new_seed(e);
	const char *answer = kind->make(e, &m);

	if (want(e, !answer, "the answer is %s", answer)) {
		bytes = min(m.bytes, EDU_MOVE_MAX);
		receive(e, m.at, bytes, seed);
		holds(e, m.memory, bytes, seed, 0, 0, 0, 0);
		kind->undo(e, &m);
	}
	kind->drop(&m);
}

/*
 * The host does not unmap: then nothing is unmapped, nothing is freed, and the device
 * still reaches it.
 */
static void kept(struct edu *e, unsigned long arg)
{
	const struct kind *kind = &kinds[arg];
	struct made *m = &e->kept[arg];
	u32 bytes, seed = new_seed(e);
	const char *answer;

	memset(m, 0, sizeof(*m));
	answer = kind->make(e, m);
	if (!want(e, !answer, "the answer is %s", answer)) {
		kind->drop(m);
		memset(m, 0, sizeof(*m));
		return;
	}
	kind->undo(e, m);
	bytes = min(m->bytes, EDU_MOVE_MAX);
	receive(e, m->at, bytes, seed);
	holds(e, m->memory, bytes, seed, 0, 0, 0, 0);
}

/* Then it does, and the device no longer reaches what is the driver's own memory. */
static void again(struct edu *e, unsigned long arg)
{
	const struct kind *kind = &kinds[arg];
	struct made *m = &e->kept[arg];
	u32 bytes = min(m->bytes, EDU_MOVE_MAX), seed = new_seed(e);

	if (!want(e, m->memory, "nothing was kept"))
		return;
	kind->undo(e, m);
	if (kind->drop != drop_nothing) {
		fill(m->memory, bytes, seed);
		receive(e, m->at, bytes, new_seed(e));
		holds(e, m->memory, bytes, seed, 0, 0, 0, 0);
		kind->drop(m);
	}
	memset(m, 0, sizeof(*m));
}

/* A call takes its time, and then it is done. */
static void delayed(struct edu *e, unsigned long arg)
{
	struct made m = { 0 };
	u64 start = ktime_get_ns(), mapped, unmapped;
	const char *answer = make_single(e, &m);

	mapped = ktime_get_ns();
	if (want(e, !answer, "the answer is %s", answer)) {
		undo_single(e, &m);
		unmapped = ktime_get_ns();
		want(e, mapped - start >= 50 * NSEC_PER_MSEC, "mapped after %llu ns",
		     mapped - start);
		want(e, unmapped - mapped >= 50 * NSEC_PER_MSEC, "unmapped after %llu ns",
		     unmapped - mapped);
	}
	drop_single(&m);
}

#define EACH_KIND(group, run) \
	{ group, group "_single", run, SINGLE }, \
	{ group, group "_page", run, PAGE }, \
	{ group, group "_sg_1", run, SG_1 }, \
	{ group, group "_sg_64", run, SG_64 }, \
	{ group, group "_sg_1000", run, SG_1000 }, \
	{ group, group "_sgtable", run, SGTABLE }, \
	{ group, group "_coherent", run, COHERENT }, \
	{ group, group "_attrs", run, ATTRS }, \
	{ group, group "_pages", run, PAGES }, \
	{ group, group "_noncoherent", run, NONCOHERENT }

/* Whose undoing can be repeated is in EACH_KIND; a pool forgets what it could not free. */
const struct check bad_checks[] = {
	{ "permissions", "write_to_read_only", write_to_read_only },
	{ "permissions", "read_of_write_only", read_of_write_only },
	{ "permissions", "after_unmap", after_unmap },
	{ "permissions", "after_unmap_sg", after_unmap_sg },
	{ "permissions", "neighbours", neighbours },
	{ "misuse", "double_unmap", double_unmap },
	{ "misuse", "wrong_size", wrong_size },
	{ "misuse", "wrong_start", wrong_start },
	{ "misuse", "never_mapped", never_mapped },
	{ "misuse", "unmap_zero", unmap_zero },
	{ "misuse", "double_unmap_sg", double_unmap_sg },
	{ "misuse", "wrong_nents", wrong_nents },
	{ "misuse", "coherent_wrong_free", coherent_wrong_free },
	{ "misuse", "coherent_double_free", coherent_double_free },
	EACH_KIND("refused", refused),
	{ "refused", "refused_noncontiguous", refused, NONCONTIGUOUS },
	{ "refused", "refused_pool", refused, POOL },
	{ "refused", "refused_many", refused_many, 300 },
	EACH_KIND("retried", retried),
	{ "retried", "retried_noncontiguous", retried, NONCONTIGUOUS },
	{ "retried", "retried_pool", retried, POOL },
	EACH_KIND("kept", kept),
	EACH_KIND("again", again),
	{ "delayed", "delayed", delayed },
	{ }
};
