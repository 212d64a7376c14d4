// SPDX-License-Identifier: GPL-2.0
/*
 * Test module: says for every PCI device which dma_map_ops it has, and maps a
 * page for one that has none of its own, to see that the address is the page's.
 */
#include <linux/dma-map-ops.h>
#include <linux/dma-mapping.h>
#include <linux/module.h>
#include <linux/pci.h>

static void try_map(struct pci_dev *pdev)
{
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	dma_addr_t address;

	if (!page)
		return;
	if (dma_set_mask(&pdev->dev, DMA_BIT_MASK(64)) == 0) {
		address = dma_map_page(&pdev->dev, page, 0, PAGE_SIZE, DMA_TO_DEVICE);
		if (dma_mapping_error(&pdev->dev, address)) {
			pr_info("dmaprobe: %s: mapping failed\n", pci_name(pdev));
		} else {
			pr_info("dmaprobe: %s: mapped %s\n", pci_name(pdev),
				address == page_to_phys(page) ? "one to one" : "elsewhere");
			dma_unmap_page(&pdev->dev, address, PAGE_SIZE, DMA_TO_DEVICE);
		}
	}
	__free_page(page);
}

static int __init dmaprobe_init(void)
{
	struct pci_dev *pdev = NULL;

	for_each_pci_dev(pdev) {
		const struct dma_map_ops *ops = get_dma_ops(&pdev->dev);

		pr_info("dmaprobe: %s: %s\n", pci_name(pdev),
			ops ? "ops of its own" : "no ops of its own");
		if (!ops)
			try_map(pdev);
	}
	return 0;
}

static void __exit dmaprobe_exit(void)
{
}

module_init(dmaprobe_init);
module_exit(dmaprobe_exit);
MODULE_DESCRIPTION("Shows the DMA operations of PCI devices");
MODULE_LICENSE("GPL");
