// SPDX-License-Identifier: GPL-2.0
/*
 * Test module: takes many pages and gives every so many-th of them back, so that who
 * asks for pages next gets such as have no neighbours. The others it has until it
 * is unloaded. It touches none of them.
 */
#include <linux/gfp.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>

static unsigned int pages = 1024;
module_param(pages, uint, 0444);
MODULE_PARM_DESC(pages, "pages to take");
static unsigned int every = 2;
module_param(every, uint, 0444);
MODULE_PARM_DESC(every, "give every so many-th of them back");

static LIST_HEAD(kept);

static void put_pages(struct list_head *list)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, list, lru) {
		list_del(&page->lru);
		__free_page(page);
	}
}

static int __init scatter_init(void)
{
	LIST_HEAD(given);
	unsigned int i;

	if (!every)
		return -EINVAL;
	for (i = 0; i < pages; i++) {
		/* of the same kind as programs' memory: the kernel keeps kinds apart */
		struct page *page = alloc_page(GFP_HIGHUSER_MOVABLE | __GFP_NOWARN);

		if (!page)
			break;
		/* by where it is, and not by when it came */
		list_add(&page->lru, page_to_pfn(page) % every ? &kept : &given);
	}
	put_pages(&given);
	if (i == pages)
		return 0;
	put_pages(&kept);
	return -ENOMEM;
}

static void __exit scatter_exit(void)
{
	put_pages(&kept);
}

module_init(scatter_init);
module_exit(scatter_exit);
MODULE_DESCRIPTION("Leaves free pages without neighbours");
MODULE_LICENSE("GPL");
