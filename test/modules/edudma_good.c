// SPDX-License-Identifier: GPL-2.0
/*
 * edudma.ko: every operation of the DMA API as a driver uses it, with the device moving
 * the bytes. These checks expect to succeed, except where the API itself says no (no
 * memory there, no room below the mask).
 */
#include <linux/dma-map-ops.h>
#include <linux/dmapool.h>
#include <linux/fs.h>
#include <linux/jiffies.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "edudma.h"

/* ---- the device's other registers ---- */

static void identity(struct edu *e, unsigned long arg)
{
	u32 value = readl(e->regs + EDU_IDENTITY);

	want(e, (value & 0xffff) == 0x00ed, "%#x", value);
}

static void liveness(struct edu *e, unsigned long arg)
{
	writel(0x12345678, e->regs + EDU_LIVENESS);
	want(e, readl(e->regs + EDU_LIVENESS) == 0xedcba987, "%#x is no inversion of 0x12345678",
	     readl(e->regs + EDU_LIVENESS));
}

static void factorial(struct edu *e, unsigned long with_irq)
{
	unsigned long end = jiffies + 30 * HZ;

	writel(with_irq ? EDU_STATUS_IRQ : 0, e->regs + EDU_STATUS);
	writel(10, e->regs + EDU_FACTORIAL);
	if (with_irq && !edu_wait_irq(e, EDU_IRQ_FACTORIAL))
		return;
	while (readl(e->regs + EDU_STATUS) & EDU_STATUS_COMPUTING) {
		if (!want(e, time_before(jiffies, end), "computes without end"))
			return;
		cond_resched();
	}
	want(e, readl(e->regs + EDU_FACTORIAL) == 3628800, "10! is %u",
	     readl(e->regs + EDU_FACTORIAL));
}

static void raised_irq(struct edu *e, unsigned long arg)
{
	writel(0x20002, e->regs + EDU_IRQ_RAISE);
	if (edu_wait_irq(e, 0x20002))
		want(e, !readl(e->regs + EDU_IRQ_STATUS), "not acknowledged");
}

/* A transfer without an interrupt, waited for as the device's documentation does. */
static void polled(struct edu *e, unsigned long arg)
{
	unsigned long end = jiffies + 30 * HZ;
	u32 seed = new_seed(e);

	fill(e->in, 100, seed);
	writeq(e->in_at, e->regs + EDU_DMA_SRC);
	writeq(EDU_BUFFER, e->regs + EDU_DMA_DST);
	writeq(100, e->regs + EDU_DMA_COUNT);
	writeq(EDU_DMA_RUN, e->regs + EDU_DMA_COMMAND);
	while (readq(e->regs + EDU_DMA_COMMAND) & EDU_DMA_RUN) {
		if (!want(e, time_before(jiffies, end), "transfers without end"))
			return;
		cond_resched();
	}
	memset(e->out, 0, PAGE_SIZE);
	if (edu_store(e, e->out_at, 100))
		holds(e, e->out, 100, seed, 0, 0, 0, 0);
}

/* ---- streaming mappings ---- */

static void single_to_device(struct edu *e, unsigned long arg)
{
	u8 *memory = get_memory(e, 0, new_seed(e));
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory + 0x123, 1001, DMA_TO_DEVICE);
	if (usable(e, at, 1001, 0x123)) {
		sends(e, at, memory + 0x123, 1001);
		dma_unmap_single(e->dev, at, 1001, DMA_TO_DEVICE);
	}
	free_memory(memory, 0);
}

/* What the device writes is exactly what changes, in the page and in its neighbours. */
static void single_from_device(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e), start = 2 * PAGE_SIZE + 0x2ab;
	u8 *memory = get_memory(e, 2, seed);
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory + start, 999, DMA_FROM_DEVICE);
	if (usable(e, at, 999, 0x2ab)) {
		receive(e, at, 999, other);
		dma_unmap_single(e->dev, at, 999, DMA_FROM_DEVICE);
		holds(e, memory, 4 * PAGE_SIZE, seed, start, 999, other, 0);
	}
	free_memory(memory, 2);
}

static void single_bidirectional(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e);
	u8 *memory = get_memory(e, 0, seed);
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory, PAGE_SIZE, DMA_BIDIRECTIONAL);
	if (usable(e, at, PAGE_SIZE, 0)) {
		if (edu_fetch(e, at + 11, 1500))
			edu_store(e, at + 2003, 1500);
		dma_unmap_single(e->dev, at, PAGE_SIZE, DMA_BIDIRECTIONAL);
		holds(e, memory, PAGE_SIZE, seed, 2003, 1500, seed, 11);
	}
	free_memory(memory, 0);
}

static void page_last_byte(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e);
	u8 *memory = get_memory(e, 0, seed);
	dma_addr_t at;

	if (!memory)
		return;
	memory[PAGE_SIZE - 1] = 0;
	at = dma_map_page(e->dev, virt_to_page(memory), PAGE_SIZE - 1, 1, DMA_FROM_DEVICE);
	if (usable(e, at, 1, PAGE_SIZE - 1)) {
		receive(e, at, 1, other);
		dma_unmap_page(e->dev, at, 1, DMA_FROM_DEVICE);
		holds(e, memory, PAGE_SIZE, seed, PAGE_SIZE - 1, 1, other, 0);
	}
	free_memory(memory, 0);
}

/* One transfer from and one to a mapping that crosses a page's end. */
static void page_crossing(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e);
	u8 *from = get_memory(e, 1, seed), *to = get_memory(e, 1, other);
	dma_addr_t from_at, to_at;

	if (!from || !to)
		goto free;
	from_at = dma_map_page(e->dev, virt_to_page(from), 1501, 3500, DMA_TO_DEVICE);
	to_at = dma_map_page(e->dev, virt_to_page(to), 3001, 3500, DMA_FROM_DEVICE);
	if (usable(e, from_at, 3500, 1501) && usable(e, to_at, 3500, 3001)) {
		if (edu_fetch(e, from_at, 3500))
			edu_store(e, to_at, 3500);
		dma_unmap_page(e->dev, to_at, 3500, DMA_FROM_DEVICE);
		dma_unmap_page(e->dev, from_at, 3500, DMA_TO_DEVICE);
		holds(e, to, 2 * PAGE_SIZE, other, 3001, 3500, seed, 1501);
	}
free:
	free_memory(from, 1);
	free_memory(to, 1);
}

/* An offset beyond the first page, which dma_map_page() allows, and a length of many. */
static void page_long(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e), start = PAGE_SIZE + 77, bytes = 20000;
	u8 *memory = get_memory(e, 3, seed);
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_page(e->dev, virt_to_page(memory), start, bytes, DMA_FROM_DEVICE);
	if (usable(e, at, bytes, 77)) {
		if (receive(e, at + bytes - 3000, 3000, other))
			edu_store(e, at, 3000);
		dma_unmap_page(e->dev, at, bytes, DMA_FROM_DEVICE);
		holds(e, memory, start + 3000, seed, start, 3000, other, 0);
		holds(e, memory + start + bytes - 3000, 3000, other, 0, 0, 0, 0);
	}
	free_memory(memory, 3);
}

/* A mapping that the driver and the device use in turn. */
static void sync_single(struct edu *e, unsigned long arg)
{
	u32 first = new_seed(e), second = new_seed(e), third = new_seed(e);
	u8 *memory = get_memory(e, 0, new_seed(e));
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single(e->dev, memory, PAGE_SIZE, DMA_BIDIRECTIONAL);
	if (!usable(e, at, PAGE_SIZE, 0))
		goto free;
	want(e, !dma_need_sync(e->dev, at), "x86 needs no sync, and nothing bounces");

	receive(e, at, 2000, first);
	dma_sync_single_for_cpu(e->dev, at, PAGE_SIZE, DMA_BIDIRECTIONAL);
	holds(e, memory, 2000, first, 0, 0, 0, 0);
	fill(memory, 2000, second);
	dma_sync_single_for_device(e->dev, at, PAGE_SIZE, DMA_BIDIRECTIONAL);
	sends(e, at, memory, 2000);

	dma_sync_single_range_for_cpu(e->dev, at, 1000, 1000, DMA_BIDIRECTIONAL);
	fill(memory + 1000, 1000, third);
	dma_sync_single_range_for_device(e->dev, at, 1000, 1000, DMA_BIDIRECTIONAL);
	sends(e, at + 1000, memory + 1000, 1000);
	dma_unmap_single(e->dev, at, PAGE_SIZE, DMA_BIDIRECTIONAL);
free:
	free_memory(memory, 0);
}

static void attributes(struct edu *e, unsigned long arg)
{
	unsigned long attrs = DMA_ATTR_SKIP_CPU_SYNC | DMA_ATTR_NO_WARN | DMA_ATTR_WEAK_ORDERING;
	u8 *memory = get_memory(e, 0, new_seed(e));
	dma_addr_t at;

	if (!memory)
		return;
	at = dma_map_single_attrs(e->dev, memory + 9, 700, DMA_TO_DEVICE, attrs);
	if (usable(e, at, 700, 9)) {
		sends(e, at, memory + 9, 700);
		dma_unmap_single_attrs(e->dev, at, 700, DMA_TO_DEVICE, attrs);
	}
	free_memory(memory, 0);
}

/* With interrupts off, as a driver maps in its submission path and unmaps in its handler. */
static void atomic(struct edu *e, unsigned long arg)
{
	static DEFINE_SPINLOCK(lock);
	u8 *memory = get_memory(e, 0, new_seed(e));
	unsigned long irq;
	dma_addr_t at;

	if (!memory)
		return;
	spin_lock_irqsave(&lock, irq);
	at = dma_map_single(e->dev, memory, 300, DMA_TO_DEVICE);
	spin_unlock_irqrestore(&lock, irq);
	if (usable(e, at, 300, 0)) {
		sends(e, at, memory, 300);
		spin_lock_irqsave(&lock, irq);
		dma_unmap_single(e->dev, at, 300, DMA_TO_DEVICE);
		spin_unlock_irqrestore(&lock, irq);
	}
	free_memory(memory, 0);
}

/* Two mappings of one page live and die apart. */
static void twice(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e);
	u8 *memory = get_memory(e, 0, seed);
	dma_addr_t first, second;

	if (!memory)
		return;
	first = dma_map_single(e->dev, memory + 8, 800, DMA_FROM_DEVICE);
	second = dma_map_single(e->dev, memory + 900, 800, DMA_FROM_DEVICE);
	if (!usable(e, first, 800, 8) || !usable(e, second, 800, 900))
		goto free;
	dma_unmap_single(e->dev, first, 800, DMA_FROM_DEVICE);
	receive(e, second, 800, other);
	edu_store(e, first, 800);	/* refused */
	dma_unmap_single(e->dev, second, 800, DMA_FROM_DEVICE);
	holds(e, memory, PAGE_SIZE, seed, 900, 800, other, 0);
free:
	free_memory(memory, 0);
}

static int compare_addresses(const void *a, const void *b)
{
	dma_addr_t one = *(const dma_addr_t *)a, two = *(const dma_addr_t *)b;

	return one < two ? -1 : one > two;
}

/* Many mappings at a time overlap nowhere; they go in another order than they came. */
static void many(struct edu *e, unsigned long arg)
{
	const u32 most = 500;
	dma_addr_t *at = kcalloc(2 * most, sizeof(*at), GFP_KERNEL), *pages = at + most;
	u8 *memory = get_memory(e, 0, new_seed(e));
	u32 i, n;

	if (!want(e, at, "no memory") || !memory)
		goto free;
	for (n = 0; n < most; n++) {
		at[n] = dma_map_single(e->dev, memory + n, 3, DMA_BIDIRECTIONAL);
		if (!usable(e, at[n], 3, n))
			break;
		pages[n] = at[n] >> PAGE_SHIFT;
	}
	sort(pages, n, sizeof(*pages), compare_addresses, NULL);
	for (i = 1; i < n; i++)
		want(e, pages[i] != pages[i - 1], "two mappings on one page of addresses");
	for (i = 0; i < n; i++)
		dma_unmap_single(e->dev, at[n == most ? i * 7 % most : i], 3, DMA_BIDIRECTIONAL);
free:
	free_memory(memory, 0);
	kfree(at);
}

/* A BAR is not RAM: no device of this guest is given another's registers. */
static void resource(struct edu *e, unsigned long arg)
{
	dma_addr_t at = dma_map_resource(e->dev, pci_resource_start(e->pdev, 0), PAGE_SIZE,
					 DMA_BIDIRECTIONAL, 0);

	if (!want(e, dma_mapping_error(e->dev, at), "a BAR is mapped"))
		dma_unmap_resource(e->dev, at, PAGE_SIZE, DMA_BIDIRECTIONAL, 0);
}

/* ---- lists ---- */

/*
 * Has the device move some entries of one list to the same entries of another, and looks
 * at every byte of both.
 */
static void move_entries(struct edu *e, struct list *from, struct list *to, const u32 *moved,
			 u32 moves)
{
	u32 m;

	for (m = 0; m < moves; m++) {
		u32 bytes = min(list_entry_of(from, moved[m])->length, EDU_MOVE_MAX);

		if (!edu_fetch(e, list_at(e, from, moved[m]), bytes) ||
		    !edu_store(e, list_at(e, to, moved[m]), bytes))
			return;
	}
}

/* Two lists of `count' odd entries, one for reading and one for writing. */
static void sg(struct edu *e, unsigned long count)
{
	static const u32 of_1[] = { 0 }, of_64[] = { 0, 31, 63 }, of_1000[] = { 0, 255, 256, 999 };
	const u32 *moved = count == 1 ? of_1 : count == 64 ? of_64 : of_1000;
	u32 moves = count == 1 ? 1 : count == 64 ? 3 : 4;
	struct list from, to;

	if (!list_make(e, &from, count, true))
		return;
	if (!list_make(e, &to, count, true))
		goto free_from;
	from.segments = dma_map_sg(e->dev, from.table.sgl, count, DMA_TO_DEVICE);
	if (!want(e, from.segments, "not mapped"))
		goto free_to;
	to.segments = dma_map_sg(e->dev, to.table.sgl, count, DMA_FROM_DEVICE);
	if (!want(e, to.segments, "not mapped"))
		goto unmap_from;

	if (list_usable(e, &from) && list_usable(e, &to))
		move_entries(e, &from, &to, moved, moves);
	dma_unmap_sg(e->dev, to.table.sgl, count, DMA_FROM_DEVICE);
	list_holds(e, &to, &from, moved, moves);
unmap_from:
	dma_unmap_sg(e->dev, from.table.sgl, count, DMA_TO_DEVICE);
	list_holds(e, &from, NULL, NULL, 0);
free_to:
	list_free(&to);
free_from:
	list_free(&from);
}

/* Whole pages, wherever they lie, become one segment, through which one transfer goes. */
static void sg_merged(struct edu *e, unsigned long arg)
{
	struct list list;
	u32 seed;

	if (!list_make(e, &list, 16, false))
		return;
	seed = list.seed;
	list.segments = dma_map_sg(e->dev, list.table.sgl, list.count, DMA_BIDIRECTIONAL);
	if (want(e, list.segments, "not mapped")) {
		if (want(e, list.segments == 1, "%d segments", list.segments) &&
		    list_usable(e, &list) &&
		    edu_fetch(e, sg_dma_address(list.table.sgl) + 5 * PAGE_SIZE - 1000, 2000))
			edu_store(e, sg_dma_address(list.table.sgl) + 9 * PAGE_SIZE - 1000, 2000);
		dma_unmap_sg(e->dev, list.table.sgl, list.count, DMA_BIDIRECTIONAL);
		holds(e, page_address(list.pages[8]), PAGE_SIZE, seed + 8, PAGE_SIZE - 1000, 1000,
		      seed + 4, PAGE_SIZE - 1000);
		holds(e, page_address(list.pages[9]), PAGE_SIZE, seed + 9, 0, 1000, seed + 5, 0);
	}
	list_free(&list);
}

/* The device's own limits to a segment are kept. */
static void sg_limited(struct edu *e, unsigned long arg)
{
	u64 boundary = dma_get_seg_boundary(e->dev);
	u32 most = dma_get_max_seg_size(e->dev);
	const u32 moved[] = { 0, 50 };
	struct list from, to;

	if (!list_make(e, &from, 64, false))
		return;
	if (!list_make(e, &to, 64, false))
		goto free;
	dma_set_max_seg_size(e->dev, 3 * PAGE_SIZE);
	dma_set_seg_boundary(e->dev, 8 * PAGE_SIZE - 1);
	from.segments = dma_map_sg(e->dev, from.table.sgl, from.count, DMA_TO_DEVICE);
	to.segments = dma_map_sg(e->dev, to.table.sgl, to.count, DMA_FROM_DEVICE);
	if (want(e, from.segments && to.segments, "not mapped") && list_usable(e, &from) &&
	    list_usable(e, &to)) {
		want(e, from.segments >= 22 && from.segments < 64, "%d segments", from.segments);
		move_entries(e, &from, &to, moved, 1);
	}
	if (from.segments)
		dma_unmap_sg(e->dev, from.table.sgl, from.count, DMA_TO_DEVICE);
	if (to.segments)
		dma_unmap_sg(e->dev, to.table.sgl, to.count, DMA_FROM_DEVICE);
	dma_set_max_seg_size(e->dev, most);
	dma_set_seg_boundary(e->dev, boundary);
	holds(e, page_address(to.pages[0]), PAGE_SIZE, to.seed, 0, EDU_MOVE_MAX, from.seed, 0);
	list_free(&to);
free:
	list_free(&from);
}

/* The newer interface, and synchronising a list. */
static void sgtable(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), other = new_seed(e);
	struct scatterlist *entry;
	struct list list;
	u8 *memory;
	int err;

	if (!list_make(e, &list, 64, true))
		return;
	err = dma_map_sgtable(e->dev, &list.table, DMA_BIDIRECTIONAL, 0);
	if (!want(e, !err, "not mapped: %d", err))
		goto free;
	list.segments = list.table.nents;
	entry = list_entry_of(&list, 40);
	memory = sg_virt(entry);
	if (list_usable(e, &list)) {
		receive(e, list_at(e, &list, 40), entry->length, seed);
		dma_sync_sgtable_for_cpu(e->dev, &list.table, DMA_BIDIRECTIONAL);
		holds(e, memory, entry->length, seed, 0, 0, 0, 0);
		fill(memory, entry->length, other);
		dma_sync_sgtable_for_device(e->dev, &list.table, DMA_BIDIRECTIONAL);
		sends(e, list_at(e, &list, 40), memory, entry->length);
	}
	dma_unmap_sgtable(e->dev, &list.table, DMA_BIDIRECTIONAL, 0);
free:
	list_free(&list);
}

/* The first entries of a list: the rest is not looked at, and not unmapped. */
static void sg_part(struct edu *e, unsigned long arg)
{
	struct list list;
	int whole;

	if (!list_make(e, &list, 64, true))
		return;
	list.segments = dma_map_sg(e->dev, list.table.sgl, 10, DMA_TO_DEVICE);
	if (want(e, list.segments && list.segments <= 10, "10 entries became %d segments",
		 list.segments)) {
		if (usable(e, list_at(e, &list, 9), list_entry_of(&list, 9)->length,
			   list_entry_of(&list, 9)->offset))
			sends(e, list_at(e, &list, 9), sg_virt(list_entry_of(&list, 9)),
			      list_entry_of(&list, 9)->length);
		dma_unmap_sg(e->dev, list.table.sgl, 10, DMA_TO_DEVICE);
	}
	whole = dma_map_sg(e->dev, list.table.sgl, 64, DMA_TO_DEVICE);
	if (want(e, whole, "not mapped"))
		dma_unmap_sg(e->dev, list.table.sgl, 64, DMA_TO_DEVICE);
	list_free(&list);
}

/* ---- coherent memory ---- */

/* Zeroed, aligned to its size rounded up to a power of two, and all of it is reached. */
static void look_at_coherent(struct edu *e, u8 *memory, dma_addr_t at, u32 bytes)
{
	u32 n = min(bytes / 2, 2000u), aligned = PAGE_SIZE << get_order(bytes);

	if (!usable(e, at, bytes, 0) || !want(e, !memchr_inv(memory, 0, bytes), "not zeroed") ||
	    !want(e, IS_ALIGNED(at, aligned) && IS_ALIGNED((unsigned long)memory, aligned),
		  "not aligned to %u", aligned))
		return;
	fill(memory, n, new_seed(e));
	if (edu_fetch(e, at, n) && edu_store(e, at + bytes - n, n))
		want(e, !memcmp(memory, memory + bytes - n, n) &&
		     !memchr_inv(memory + n, 0, bytes - 2 * n),
		     "other bytes came than went");
}

static void coherent(struct edu *e, unsigned long bytes)
{
	dma_addr_t at;
	u8 *memory = dma_alloc_coherent(e->dev, bytes, &at, GFP_KERNEL);

	if (!want(e, memory, "no memory"))
		return;
	look_at_coherent(e, memory, at, bytes);
	dma_free_coherent(e->dev, bytes, memory, at);
}

static void alloc_attrs(struct edu *e, unsigned long arg)
{
	unsigned long attrs = DMA_ATTR_FORCE_CONTIGUOUS | DMA_ATTR_WRITE_COMBINE | DMA_ATTR_NO_WARN;
	dma_addr_t at;
	u8 *memory = dma_alloc_attrs(e->dev, 5000, &at, GFP_KERNEL, attrs);

	if (!want(e, memory, "no memory"))
		return;
	look_at_coherent(e, memory, at, 5000);
	dma_free_attrs(e->dev, 5000, memory, at, attrs);
}

static void alloc_atomic(struct edu *e, unsigned long arg)
{
	static DEFINE_SPINLOCK(lock);
	dma_addr_t at;
	u8 *memory;

	spin_lock(&lock);
	memory = dma_alloc_coherent(e->dev, PAGE_SIZE, &at, GFP_ATOMIC);
	spin_unlock(&lock);
	if (!want(e, memory, "no memory"))
		return;
	look_at_coherent(e, memory, at, PAGE_SIZE);
	dma_free_coherent(e->dev, PAGE_SIZE, memory, at);
}

/* Freed by the kernel when the driver goes, or before. */
static void managed(struct edu *e, unsigned long arg)
{
	dma_addr_t at;
	u8 *memory = dmam_alloc_coherent(e->dev, PAGE_SIZE, &at, GFP_KERNEL);

	if (!want(e, memory, "no memory"))
		return;
	look_at_coherent(e, memory, at, PAGE_SIZE);
	dmam_free_coherent(e->dev, PAGE_SIZE, memory, at);
}

/* Has a direction, which the device keeps to. */
static void pages(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), bytes = 3 * PAGE_SIZE;
	struct page *page;
	dma_addr_t at;

	page = dma_alloc_pages(e->dev, bytes, &at, DMA_TO_DEVICE, GFP_KERNEL);
	if (!want(e, page, "no memory"))
		return;
	if (usable(e, at, bytes, 0)) {
		fill(page_address(page), bytes, seed);
		sends(e, at + bytes - 1000, page_address(page) + bytes - 1000, 1000);
		receive(e, at, 1000, new_seed(e));	/* refused */
		holds(e, page_address(page), bytes, seed, 0, 0, 0, 0);
	}
	dma_free_pages(e->dev, bytes, page, at, DMA_TO_DEVICE);
}

static void noncoherent(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), bytes = 2 * PAGE_SIZE;
	dma_addr_t at;
	u8 *memory = dma_alloc_noncoherent(e->dev, bytes, &at, DMA_FROM_DEVICE, GFP_KERNEL);

	if (!want(e, memory, "no memory"))
		return;
	if (usable(e, at, bytes, 0)) {
		receive(e, at + 3000, 2000, seed);
		dma_sync_single_for_cpu(e->dev, at, bytes, DMA_FROM_DEVICE);
		holds(e, memory + 3000, 2000, seed, 0, 0, 0, 0);
	}
	dma_free_noncoherent(e->dev, bytes, memory, at, DMA_FROM_DEVICE);
}

static void noncontiguous(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), bytes = 4 * PAGE_SIZE;
	struct sg_table *table =
		dma_alloc_noncontiguous(e->dev, bytes, DMA_BIDIRECTIONAL, GFP_KERNEL, 0);
	dma_addr_t at;
	u8 *memory;

	if (!want(e, table, "no memory"))
		return;
	at = sg_dma_address(table->sgl);
	memory = dma_vmap_noncontiguous(e->dev, bytes, table);
	if (want(e, memory, "not mapped for the kernel")) {
		if (want(e, table->nents == 1, "%u segments", table->nents) &&
		    usable(e, at, bytes, 0)) {
			receive(e, at + 3 * PAGE_SIZE - 500, 1000, seed);
			dma_sync_sgtable_for_cpu(e->dev, table, DMA_BIDIRECTIONAL);
			holds(e, memory + 3 * PAGE_SIZE - 500, 1000, seed, 0, 0, 0, 0);
		}
		dma_vunmap_noncontiguous(e->dev, memory);
	}
	dma_free_noncontiguous(e->dev, bytes, table, DMA_BIDIRECTIONAL);
}

/* Blocks of a pool are apart from each other, aligned, within a page, and reached. */
static void pool(struct edu *e, unsigned long arg)
{
	enum { BLOCKS = 100, BYTES = 96, ALIGN = 32 };
	struct dma_pool *pool = dma_pool_create("edudma", e->dev, BYTES, ALIGN, 0);
	u32 seed = new_seed(e), n, i;
	dma_addr_t at[BLOCKS];
	u8 *block[BLOCKS];

	if (!want(e, pool, "no pool"))
		return;
	for (n = 0; n < BLOCKS; n++) {
		block[n] = dma_pool_zalloc(pool, GFP_KERNEL, &at[n]);
		if (!want(e, block[n], "no block"))
			break;
		want(e, !memchr_inv(block[n], 0, BYTES), "not zeroed");
		want(e, IS_ALIGNED(at[n], ALIGN) && offset_in_page(at[n]) + BYTES <= PAGE_SIZE,
		     "not aligned");
		usable(e, at[n], BYTES, offset_in_page(block[n]));
		fill(block[n], BYTES, seed + n);
	}
	if (n == BLOCKS && edu_fetch(e, at[3], BYTES) && edu_store(e, at[97], BYTES))
		for (i = 0; i < n; i++)
			holds(e, block[i], BYTES, seed + (i == 97 ? 3 : i), 0, 0, 0, 0);
	while (n--)
		dma_pool_free(pool, block[n], at[n]);
	dma_pool_destroy(pool);
}

/* As a table for another device, here for the same one. */
static void get_sgtable(struct edu *e, unsigned long arg)
{
	u32 seed = new_seed(e), bytes = 5 * PAGE_SIZE;
	struct sg_table table;
	dma_addr_t at;
	u8 *memory = dma_alloc_coherent(e->dev, bytes, &at, GFP_KERNEL);
	int err;

	if (!want(e, memory, "no memory"))
		return;
	err = dma_get_sgtable(e->dev, &table, memory, at, bytes);
	if (!want(e, !err, "no table: %d", err))
		goto free;
	want(e, sg_virt(table.sgl) == memory && table.sgl->length == bytes,
	     "the table is of other memory");
	err = dma_map_sgtable(e->dev, &table, DMA_FROM_DEVICE, 0);
	if (want(e, !err, "not mapped: %d", err)) {
		want(e, sg_dma_address(table.sgl) != at, "two mappings at one address");
		receive(e, sg_dma_address(table.sgl) + bytes - 1234, 1234, seed);
		holds(e, memory + bytes - 1234, 1234, seed, 0, 0, 0, 0);
		dma_unmap_sgtable(e->dev, &table, DMA_FROM_DEVICE, 0);
	}
	sg_free_table(&table);
free:
	dma_free_coherent(e->dev, bytes, memory, at);
}

/*
 * The memory of the writing process shows coherent memory: both see what the other, and
 * the device, writes.
 */
static void mmap_coherent(struct edu *e, unsigned long arg)
{
	u32 first = new_seed(e), second = new_seed(e), bytes = 3 * PAGE_SIZE;
	const int access = PROT_READ | PROT_WRITE;
	u8 *copy = get_memory(e, 0, second);
	unsigned long user, refused;

	if (!copy)
		return;
	want(e, dma_can_mmap(e->dev), "the kernel says it cannot be mapped");
	e->shared_bytes = bytes;
	e->shared = dma_alloc_coherent(e->dev, bytes, &e->shared_at, GFP_KERNEL);
	if (!want(e, e->shared, "no memory"))
		goto free;
	user = vm_mmap(e->file, 0, bytes, access, MAP_SHARED, 0);
	if (!want(e, !IS_ERR_VALUE(user), "not mapped: %ld", user))
		goto free_shared;

	want(e, !copy_to_user((void __user *)(user + 2 * PAGE_SIZE), copy, 1000),
	     "no write to the mapping");
	sends(e, e->shared_at + 2 * PAGE_SIZE, copy, 1000);
	receive(e, e->shared_at + PAGE_SIZE, 2000, first);
	want(e, !copy_from_user(copy, (void __user *)(user + PAGE_SIZE), 2000),
	     "no read of the mapping");
	holds(e, copy, 2000, first, 0, 0, 0, 0);
	vm_munmap(user, bytes);

	user = vm_mmap(e->file, 0, PAGE_SIZE, access, MAP_SHARED, 2 * PAGE_SIZE);
	if (want(e, !IS_ERR_VALUE(user), "the last page is not mapped: %ld", user)) {
		want(e, !copy_from_user(copy, (void __user *)user, 1000), "no read of the mapping");
		holds(e, copy, 1000, second, 0, 0, 0, 0);
		vm_munmap(user, PAGE_SIZE);
	}
	refused = vm_mmap(e->file, 0, bytes + PAGE_SIZE, access, MAP_SHARED, 0);
	want(e, refused == -ENXIO, "a mapping that is too long: %ld", refused);
	refused = vm_mmap(e->file, 0, PAGE_SIZE, access, MAP_SHARED, bytes);
	want(e, refused == -ENXIO, "a mapping behind the end: %ld", refused);
free_shared:
	dma_free_coherent(e->dev, bytes, e->shared, e->shared_at);
	e->shared = NULL;
free:
	free_memory(copy, 0);
}

/* ---- sizes and masks ---- */

static void sizes(struct edu *e, unsigned long arg)
{
	size_t most = dma_max_mapping_size(e->dev), best = dma_opt_mapping_size(e->dev);
	u64 required = dma_get_required_mask(e->dev);

	want(e, most >= SZ_1M && PAGE_ALIGNED(most), "max_mapping_size is %zu", most);
	want(e, best && best <= most, "opt_mapping_size is %zu", best);
	want(e, required && !(required & (required + 1)), "required_mask is %#llx", required);
	want(e, !dma_addressing_limited(e->dev),
	     "limited, though any page gets an address below the mask");
	want(e, !dma_get_merge_boundary(e->dev), "merge_boundary is %#lx",
	     dma_get_merge_boundary(e->dev));
}

/* Longer than the host maps at a time, and than memory. */
static void too_long(struct edu *e, unsigned long arg)
{
	const size_t bytes = SZ_2G;
	dma_addr_t at = dma_map_page(e->dev, virt_to_page(e->in), 0, bytes, DMA_TO_DEVICE);

	if (!want(e, dma_mapping_error(e->dev, at), "%zu bytes are mapped", bytes))
		dma_unmap_page(e->dev, at, bytes, DMA_TO_DEVICE);
}

static void mask(struct edu *e, unsigned long bits)
{
	u8 *memory = get_memory(e, 0, new_seed(e)), *shared;
	dma_addr_t at, shared_at;
	int err;

	if (!memory)
		return;
	err = dma_set_mask_and_coherent(e->dev, DMA_BIT_MASK(bits));
	if (!want(e, !err, "not accepted: %d", err))
		goto free;
	at = dma_map_single(e->dev, memory, PAGE_SIZE, DMA_TO_DEVICE);
	shared = dma_alloc_coherent(e->dev, 5 * PAGE_SIZE, &shared_at, GFP_KERNEL);
	if (usable(e, at, PAGE_SIZE, 0)) {
		if (bits <= EDU_BITS)
			sends(e, at, memory, 1000);
		dma_unmap_single(e->dev, at, PAGE_SIZE, DMA_TO_DEVICE);
	}
	if (want(e, shared, "no coherent memory")) {
		usable(e, shared_at, 5 * PAGE_SIZE, 0);
		dma_free_coherent(e->dev, 5 * PAGE_SIZE, shared, shared_at);
	}
free:
	free_memory(memory, 0);
	want(e, !dma_set_mask_and_coherent(e->dev, DMA_BIT_MASK(EDU_BITS)),
	     "the old mask is not accepted");
}

/* Nobody gets an address below 1 MiB, so such a mask is refused, and the one before stays. */
static void mask_too_small(struct edu *e, unsigned long arg)
{
	static const u32 bits[] = { 11, 19, 20 };
	u32 i;
	int err;

	for (i = 0; i < ARRAY_SIZE(bits); i++) {
		err = dma_set_mask(e->dev, DMA_BIT_MASK(bits[i]));
		want(e, err == -EIO, "a mask of %u bits: %d", bits[i], err);
		err = dma_set_coherent_mask(e->dev, DMA_BIT_MASK(bits[i]));
		want(e, err == -EIO, "a coherent mask of %u bits: %d", bits[i], err);
	}
	want(e, dma_get_mask(e->dev) == DMA_BIT_MASK(EDU_BITS) &&
	     e->dev->coherent_dma_mask == DMA_BIT_MASK(EDU_BITS),
	     "the mask before it is gone");
}

/*
 * 1 MiB of addresses: the next mapping fails, as do those that are longer, and there is
 * room again after unmapping. Each failure is one for the host, 6 in all.
 */
static void no_room(struct edu *e, unsigned long arg)
{
	const u32 order = 9, bytes = SZ_256K;
	u8 *memory = get_memory(e, order, new_seed(e));
	dma_addr_t at[5], too_long, shared_at;
	struct list list;
	void *shared;
	u32 n, round;
	int err;

	if (!memory)
		return;
	if (!list_make(e, &list, 257, true))
		goto free;
	want(e, !dma_set_mask_and_coherent(e->dev, DMA_BIT_MASK(21)),
	     "the mask of 21 bits is not accepted");
	for (round = 0; round < 2; round++) {
		for (n = 0; n < 5; n++) {
			at[n] = dma_map_single(e->dev, memory, bytes, DMA_TO_DEVICE);
			if (dma_mapping_error(e->dev, at[n]))
				break;
			usable(e, at[n], bytes, 0);
		}
		want(e, n >= 1 && n <= 4, "%u mappings of 256 KiB in 1 MiB of addresses", n);
		while (n--)
			dma_unmap_single(e->dev, at[n], bytes, DMA_TO_DEVICE);
	}
	too_long = dma_map_single(e->dev, memory, PAGE_SIZE << order, DMA_TO_DEVICE);
	want(e, dma_mapping_error(e->dev, too_long), "2 MiB are mapped to 1 MiB of addresses");
	err = dma_map_sg(e->dev, list.table.sgl, list.count, DMA_TO_DEVICE);
	want(e, !err, "a list of 257 pages is mapped to 1 MiB of addresses: %d", err);
	err = dma_map_sgtable(e->dev, &list.table, DMA_TO_DEVICE, 0);
	want(e, err == -ENOMEM, "a table of 257 pages: %d", err);
	shared = dma_alloc_coherent(e->dev, SZ_2M, &shared_at, GFP_KERNEL);
	want(e, !shared, "2 MiB of coherent memory in 1 MiB of addresses");
	want(e, !dma_set_mask_and_coherent(e->dev, DMA_BIT_MASK(EDU_BITS)),
	     "the old mask is not accepted");
	list_free(&list);
free:
	free_memory(memory, order);
}

/*
 * A list whose first part fits below the mask and whose rest does not: 3 MiB of addresses,
 * 4 MiB of pages. The part is taken back, and its room is there for the next. Each failure
 * is one for the host, 3 in all.
 */
static void sg_no_room(struct edu *e, unsigned long arg)
{
	struct list list;
	u32 round;
	int n;

	if (!list_make(e, &list, 1000, true))
		return;
	want(e, !dma_set_mask(e->dev, DMA_BIT_MASK(22)), "the mask of 22 bits is not accepted");
	for (round = 0; round < 3; round++) {
		n = dma_map_sg(e->dev, list.table.sgl, list.count, DMA_TO_DEVICE);
		want(e, !n, "1000 pages are mapped to 3 MiB of addresses: %d", n);
		n = dma_map_sg(e->dev, list.table.sgl, 600, DMA_TO_DEVICE);
		if (want(e, n, "600 pages are not mapped to 3 MiB of addresses"))
			dma_unmap_sg(e->dev, list.table.sgl, 600, DMA_TO_DEVICE);
	}
	want(e, !dma_set_mask(e->dev, DMA_BIT_MASK(EDU_BITS)), "the old mask is not accepted");
	list_free(&list);
}

const struct check good_checks[] = {
	{ "registers", "identity", identity },
	{ "registers", "liveness", liveness },
	{ "registers", "factorial", factorial, false },
	{ "registers", "factorial_irq", factorial, true },
	{ "registers", "raised_irq", raised_irq },
	{ "registers", "polled", polled },
	{ "streaming", "single_to_device", single_to_device },
	{ "streaming", "single_from_device", single_from_device },
	{ "streaming", "single_bidirectional", single_bidirectional },
	{ "streaming", "page_last_byte", page_last_byte },
	{ "streaming", "page_crossing", page_crossing },
	{ "streaming", "page_long", page_long },
	{ "streaming", "sync_single", sync_single },
	{ "streaming", "attributes", attributes },
	{ "streaming", "atomic", atomic },
	{ "streaming", "twice", twice },
	{ "streaming", "many", many },
	{ "streaming", "resource", resource },
	{ "lists", "sg_1", sg, 1 },
	{ "lists", "sg_64", sg, 64 },
	{ "lists", "sg_1000", sg, 1000 },
	{ "lists", "sg_merged", sg_merged },
	{ "lists", "sg_limited", sg_limited },
	{ "lists", "sg_part", sg_part },
	{ "lists", "sgtable", sgtable },
	{ "coherent", "coherent_64", coherent, 64 },
	{ "coherent", "coherent_4K", coherent, SZ_4K },
	{ "coherent", "coherent_12K", coherent, 3 * SZ_4K },
	{ "coherent", "coherent_64K", coherent, SZ_64K },
	{ "coherent", "coherent_1M", coherent, SZ_1M },
	{ "coherent", "alloc_attrs", alloc_attrs },
	{ "coherent", "alloc_atomic", alloc_atomic },
	{ "coherent", "managed", managed },
	{ "coherent", "pages", pages },
	{ "coherent", "noncoherent", noncoherent },
	{ "coherent", "noncontiguous", noncontiguous },
	{ "coherent", "pool", pool },
	{ "coherent", "get_sgtable", get_sgtable },
	{ "coherent", "mmap_coherent", mmap_coherent },
	{ "limits", "sizes", sizes },
	{ "limits", "too_long", too_long },
	{ "limits", "mask_24", mask, 24 },
	{ "limits", "mask_28", mask, 28 },
	{ "limits", "mask_32", mask, 32 },
	{ "limits", "mask_40", mask, 40 },
	{ "limits", "mask_64", mask, 64 },
	{ "limits", "mask_too_small", mask_too_small },
	{ "limits", "no_room", no_room },
	{ "limits", "sg_no_room", sg_no_room },
	{ }
};
