// SPDX-License-Identifier: GPL-2.0
/*
 * Test module: what it costs to map and unmap for DMA, over the plain DMA API, so
 * that it runs under any VMM. Maps pages for a device that has a driver, which goes
 * on as if nothing had happened: nobody tells the device. Does its work in its init
 * and is idle from then on. Prints:
 *
 *   dmabench: pair THREADS NANOSECONDS…	a page mapped and unmapped, by round
 *   dmabench: list ENTRIES NANOSECONDS…	a list of scattered pages
 *
 * @device: PCI address, such as 0000:00:01.0
 * @threads: CPUs that map at once, each pages of its own
 * @ms: how long a round takes
 */
#include <linux/completion.h>
#include <linux/cpumask.h>
#include <linux/dma-mapping.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

static char *device = "";
module_param(device, charp, 0444);
static uint threads = 1;
module_param(threads, uint, 0444);
static uint ms = 300;
module_param(ms, uint, 0444);

#define PAGES	64u
#define BLOCK_ORDER	get_order(2 * PAGES * PAGE_SIZE)
#define ROUNDS	5u
#define BATCH	8u
#define THREADS_MAX 8u

struct bench {
	struct device *dev;
	struct page *block;
	struct page *pages[PAGES];
	struct completion done;
	u64 ns[ROUNDS];
	int err;
};

static struct bench benches[THREADS_MAX];

/*
 * Every second page of a block: no two follow each other, and how far apart they are,
 * which a lookup by page costs by, is not for chance to say.
 */
static int get_pages(struct bench *bench)
{
	unsigned int i;

	bench->block = alloc_pages(GFP_KERNEL, BLOCK_ORDER);
	if (!bench->block)
		return -ENOMEM;
	for (i = 0; i < PAGES; i++)
		bench->pages[i] = nth_page(bench->block, 2 * i);
	return 0;
}

static void put_pages(struct bench *bench)
{
	if (bench->block)
		__free_pages(bench->block, BLOCK_ORDER);
	bench->block = NULL;
}

static int pair(struct bench *bench, unsigned int turn)
{
	dma_addr_t address = dma_map_page(bench->dev, bench->pages[turn % PAGES], 0,
					  PAGE_SIZE, DMA_BIDIRECTIONAL);

	if (dma_mapping_error(bench->dev, address))
		return -EIO;
	dma_unmap_page(bench->dev, address, PAGE_SIZE, DMA_BIDIRECTIONAL);
	return 0;
}

/* Repeats pairs for as long as a round takes; returns nanoseconds per pair. */
static s64 pairs(struct bench *bench)
{
	u64 start = ktime_get_ns(), now;
	unsigned int count = 0, i;

	do {
		for (i = 0; i < BATCH; i++) {
			if (pair(bench, count + i))
				return -EIO;
		}
		count += BATCH;
		cond_resched();
		now = ktime_get_ns();
	} while (now - start < (u64)ms * NSEC_PER_MSEC);
	return div_u64(now - start, count);
}

static int run_pairs(void *data)
{
	struct bench *bench = data;
	unsigned int round, i;
	s64 ns;

	/* once each, so that nothing is done for the first time */
	for (i = 0; i < PAGES && !bench->err; i++)
		bench->err = pair(bench, i);
	for (round = 0; round < ROUNDS && !bench->err; round++) {
		ns = pairs(bench);
		if (ns < 0)
			bench->err = ns;
		bench->ns[round] = ns;
	}
	/* not a word of this module's after that: it may be gone */
	kthread_complete_and_exit(&bench->done, 0);
}

/* All threads at once; a round's figure is the mean over them. */
static int measure_pairs(struct device *dev)
{
	u64 ns[ROUNDS] = { 0 };
	unsigned int i, round;
	int err = 0;

	for (i = 0; i < threads; i++) {
		struct task_struct *task;

		benches[i].dev = dev;
		benches[i].err = 0;
		init_completion(&benches[i].done);
		task = kthread_create(run_pairs, &benches[i], "dmabench/%u", i);
		if (IS_ERR(task)) {
			benches[i].err = PTR_ERR(task);
			complete(&benches[i].done);
			continue;
		}
		kthread_bind(task, i);
		wake_up_process(task);
	}
	for (i = 0; i < threads; i++) {
		wait_for_completion(&benches[i].done);
		if (benches[i].err)
			err = benches[i].err;
		for (round = 0; round < ROUNDS; round++)
			ns[round] += benches[i].ns[round];
	}
	if (err)
		return err;
	pr_info("dmabench: pair %u %llu %llu %llu %llu %llu\n", threads,
		ns[0] / threads, ns[1] / threads, ns[2] / threads, ns[3] / threads,
		ns[4] / threads);
	return 0;
}

static int list(struct bench *bench, struct scatterlist *sgl)
{
	unsigned int i;

	sg_init_table(sgl, PAGES);
	for (i = 0; i < PAGES; i++)
		sg_set_page(&sgl[i], bench->pages[i], PAGE_SIZE, 0);
	if (dma_map_sg(bench->dev, sgl, PAGES, DMA_BIDIRECTIONAL) <= 0)
		return -EIO;
	dma_unmap_sg(bench->dev, sgl, PAGES, DMA_BIDIRECTIONAL);
	return 0;
}

static int measure_lists(struct bench *bench)
{
	struct scatterlist *sgl = kmalloc_array(PAGES, sizeof(*sgl), GFP_KERNEL);
	u64 ns[ROUNDS];
	unsigned int round;
	int err;

	if (!sgl)
		return -ENOMEM;
	err = list(bench, sgl);
	for (round = 0; round < ROUNDS && !err; round++) {
		u64 start = ktime_get_ns(), now;
		unsigned int count = 0;

		do {
			err = list(bench, sgl);
			count++;
			cond_resched();
			now = ktime_get_ns();
		} while (!err && now - start < (u64)ms * NSEC_PER_MSEC);
		ns[round] = div_u64(now - start, count);
	}
	kfree(sgl);
	if (!err)
		pr_info("dmabench: list %u %llu %llu %llu %llu %llu\n", PAGES, ns[0], ns[1],
			ns[2], ns[3], ns[4]);
	return err;
}

static int __init dmabench_init(void)
{
	struct pci_dev *pdev = NULL;
	unsigned int i;
	int err;

	if (!threads || threads > THREADS_MAX || threads > num_online_cpus())
		return -EINVAL;
	for_each_pci_dev(pdev) {
		if (!strcmp(pci_name(pdev), device))
			break;
	}
	if (!pdev)
		return -ENODEV;
	err = 0;
	for (i = 0; i < threads && !err; i++)
		err = get_pages(&benches[i]);
	if (!err)
		err = measure_pairs(&pdev->dev);
	if (!err)
		err = measure_lists(&benches[0]);
	for (i = 0; i < threads; i++)
		put_pages(&benches[i]);
	pci_dev_put(pdev);
	return err;
}

static void __exit dmabench_exit(void)
{
}

module_init(dmabench_init);
module_exit(dmabench_exit);
MODULE_DESCRIPTION("Measures the DMA API");
MODULE_LICENSE("GPL");
