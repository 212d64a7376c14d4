/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of edudma.ko share: the device, a check and its verdict, memory with
 * known content, lists of scattered pages. `at' is a bus address; offsets and lengths are
 * in bytes.
 */
#ifndef EDUDMA_H
#define EDUDMA_H

#include <linux/dma-mapping.h>
#include <linux/miscdevice.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/wait.h>

/* Registers (QEMU, docs/specs/edu). */
#define EDU_IDENTITY		0x00
#define EDU_LIVENESS		0x04
#define EDU_FACTORIAL		0x08
#define EDU_STATUS		0x20
#define EDU_STATUS_COMPUTING	0x01
#define EDU_STATUS_IRQ		0x80
#define EDU_IRQ_STATUS		0x24
#define EDU_IRQ_RAISE		0x60
#define EDU_IRQ_ACK		0x64
#define EDU_DMA_SRC		0x80
#define EDU_DMA_DST		0x88
#define EDU_DMA_COUNT		0x90
#define EDU_DMA_COMMAND		0x98
#define EDU_DMA_RUN		0x1
#define EDU_DMA_TO_RAM		0x2
#define EDU_DMA_WITH_IRQ	0x4

#define EDU_IRQ_FACTORIAL	0x001
#define EDU_IRQ_DMA		0x100

/* The device's own memory, an address of its engine and not of the bus. */
#define EDU_BUFFER		0x40000
/*
 * Most bytes of one transfer: not the whole 4096, because QEMU before 9 ends itself when a
 * transfer touches the buffer's last byte.
 */
#define EDU_MOVE_MAX		4000u

/* Bits of a bus address that the device can emit. */
#define EDU_BITS		28

/* A list of scattered pages with known content; see list_make(). */
struct list {
	struct sg_table table;
	struct page **pages;
	u32 count;		/* 0: there is none */
	u32 seed;		/* page i is filled with the pattern seed + i */
	int segments;		/* of the mapped list */
};

/* What a failed unmap left mapped, until it is tried again. */
struct made {
	u8 *memory;
	dma_addr_t at;
	u32 bytes;
	u32 seed;
	struct page *page;
	struct dma_pool *pool;
	struct sg_table *sgt;
	struct list list;
};

#define KINDS_MAX	16

struct edu {
	struct pci_dev *pdev;
	struct device *dev;
	void __iomem *regs;
	wait_queue_head_t wait;
	atomic_t raised;	/* interrupt status bits that were acknowledged */

	struct miscdevice misc;
	struct file *file;	/* whose write runs the checks */
	struct mutex lock;	/* one run at a time; covers all below */
	char *results;
	size_t results_bytes;
	char why[200];		/* of the check at hand; empty: it is fine so far */
	u32 seed;

	/*
	 * A page that the device reads and one that it writes, mapped all the time: how
	 * the buffer is filled and seen.
	 */
	u8 *in, *out;
	dma_addr_t in_at, out_at;

	/* What mmap() shows. */
	void *shared;
	dma_addr_t shared_at;
	size_t shared_bytes;

	struct made kept[KINDS_MAX];
};

struct check {
	const char *group;
	const char *name;
	void (*run)(struct edu *e, unsigned long arg);
	unsigned long arg;
};

/* edudma_good.c, edudma_bad.c; an entry without a name ends each. */
extern const struct check good_checks[];
extern const struct check bad_checks[];

/*
 * The verdict of the check at hand: the first thing that is not as it should be stays its
 * reason. Returns `fine', so that a check can stop where going on makes no sense.
 */
__printf(3, 4) bool want(struct edu *e, bool fine, const char *format, ...);

/* edudma_main.c: what the device does. False, with a reason, when it does not answer. */
bool edu_wait_irq(struct edu *e, u32 bits);
/*
 * Moves bytes from bus address `at' to the start of the device's buffer, and back. At most
 * EDU_MOVE_MAX.
 */
bool edu_fetch(struct edu *e, dma_addr_t at, u32 bytes);
bool edu_store(struct edu *e, dma_addr_t at, u32 bytes);

/* edudma_memory.c */
u32 new_seed(struct edu *e);
void fill(void *memory, u32 bytes, u32 seed);
/*
 * 2^order pages, filled with the pattern; NULL, with a reason, when there are none.
 * free_memory() takes NULL.
 */
u8 *get_memory(struct edu *e, u32 order, u32 seed);
void free_memory(u8 *memory, u32 order);
/*
 * Is memory filled with the pattern `seed', but for `bytes' bytes from offset `from' on,
 * which hold the pattern `other' as it is from offset `base' on?
 */
bool holds(struct edu *e, const u8 *memory, u32 total, u32 seed, u32 from, u32 bytes, u32 other,
	   u32 base);
/* Is it a bus address for `bytes' bytes at `offset' in a page, within the device's mask? */
bool usable(struct edu *e, dma_addr_t at, u64 bytes, unsigned long offset);
/* Fills the device's buffer with a pattern. */
bool load_buffer(struct edu *e, u32 bytes, u32 seed);
/* The device reads from `at': does it get `bytes' bytes equal to `content'? */
bool sends(struct edu *e, dma_addr_t at, const void *content, u32 bytes);
/* The device reads from `at': does it get something else than `content'? */
bool sends_not(struct edu *e, dma_addr_t at, const void *content, u32 bytes);
/* The device writes a pattern to `at'; whether it arrives is for the caller to see. */
bool receive(struct edu *e, dma_addr_t at, u32 bytes, u32 seed);

/*
 * `count' pages in no order; entry i is all of page i, or with `odd' a part that begins
 * and ends at odd places, the same for every list. False, with a reason, without memory.
 */
bool list_make(struct edu *e, struct list *list, u32 count, bool odd);
void list_free(struct list *list);
/* Are the segments of a mapped list what a driver may expect? */
bool list_usable(struct edu *e, struct list *list);
/*
 * Bus address of entry i of a mapped list; DMA_MAPPING_ERROR, with a reason, when it is
 * not in one piece.
 */
dma_addr_t list_at(struct edu *e, struct list *list, u32 i);
struct scatterlist *list_entry_of(struct list *list, u32 i);
/*
 * Are all pages as they were filled, but for the entries in moved[], which came from the
 * same entries of `from'?
 */
bool list_holds(struct edu *e, struct list *list, const struct list *from, const u32 *moved,
		u32 moves);

#endif /* EDUDMA_H */
