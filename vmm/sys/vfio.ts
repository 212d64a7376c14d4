// <linux/vfio.h> as far as the VMM uses it: numbers and layouts, nothing else. Keys are the C names;
// test/unit/layout.test.ts compares each with the system's headers.

import type { StructLayout } from "./layout.js";

/** Request numbers: _IO(';', 100 + n), so they encode no size; argsz says how large a structure is. */
export const IOCTL = {
  VFIO_GET_API_VERSION: 0x3b64,
  VFIO_CHECK_EXTENSION: 0x3b65,
  VFIO_SET_IOMMU: 0x3b66,
  VFIO_GROUP_GET_STATUS: 0x3b67,
  VFIO_GROUP_SET_CONTAINER: 0x3b68,
  VFIO_GROUP_UNSET_CONTAINER: 0x3b69,
  VFIO_GROUP_GET_DEVICE_FD: 0x3b6a,
  VFIO_DEVICE_GET_INFO: 0x3b6b,
  VFIO_DEVICE_GET_REGION_INFO: 0x3b6c,
  VFIO_DEVICE_GET_IRQ_INFO: 0x3b6d,
  VFIO_DEVICE_SET_IRQS: 0x3b6e,
  VFIO_DEVICE_RESET: 0x3b6f,
  VFIO_IOMMU_GET_INFO: 0x3b70,
  VFIO_IOMMU_MAP_DMA: 0x3b71,
  VFIO_IOMMU_UNMAP_DMA: 0x3b72,
} as const;

export const CONSTANT = {
  VFIO_API_VERSION: 0,
  VFIO_TYPE1v2_IOMMU: 3,
  VFIO_GROUP_FLAGS_VIABLE: 1 << 0,
  VFIO_DEVICE_FLAGS_RESET: 1 << 0,
  VFIO_REGION_INFO_FLAG_MMAP: 1 << 2,
  VFIO_REGION_INFO_FLAG_CAPS: 1 << 3,
  VFIO_REGION_INFO_CAP_SPARSE_MMAP: 1,
  VFIO_IRQ_INFO_EVENTFD: 1 << 0,
  VFIO_IRQ_INFO_NORESIZE: 1 << 3,
  VFIO_IRQ_SET_DATA_NONE: 1 << 0,
  VFIO_IRQ_SET_DATA_EVENTFD: 1 << 2,
  VFIO_IRQ_SET_ACTION_UNMASK: 1 << 4,
  VFIO_IRQ_SET_ACTION_TRIGGER: 1 << 5,
  VFIO_IOMMU_INFO_PGSIZES: 1 << 0,
  VFIO_IOMMU_INFO_CAPS: 1 << 1,
  VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: 1,
  VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: 3,
  VFIO_DMA_MAP_FLAG_READ: 1 << 0,
  VFIO_DMA_MAP_FLAG_WRITE: 1 << 1,
  VFIO_PCI_CONFIG_REGION_INDEX: 7,
  VFIO_PCI_INTX_IRQ_INDEX: 0,
  VFIO_PCI_MSI_IRQ_INDEX: 1,
  VFIO_PCI_MSIX_IRQ_INDEX: 2,
  VFIO_PCI_ERR_IRQ_INDEX: 3,
  VFIO_PCI_REQ_IRQ_INDEX: 4,
} as const;

/** A member that is itself called size is written `size_`: `size` is the structure's. */
export const STRUCT = {
  vfio_group_status: { size: 8, argsz: 0, flags: 4 },
  vfio_info_cap_header: { size: 8, id: 0, version: 2, next: 4 },
  vfio_iommu_type1_info: { size: 24, argsz: 0, flags: 4, iova_pgsizes: 8, cap_offset: 16 },
  vfio_iommu_type1_info_cap_iova_range: { size: 16, header: 0, nr_iovas: 8, iova_ranges: 16 },
  vfio_iova_range: { size: 16, start: 0, end: 8 },
  vfio_iommu_type1_info_dma_avail: { size: 12, header: 0, avail: 8 },
  vfio_iommu_type1_dma_map: { size: 32, argsz: 0, flags: 4, vaddr: 8, iova: 16, size_: 24 },
  vfio_iommu_type1_dma_unmap: { size: 24, argsz: 0, flags: 4, iova: 8, size_: 16 },
  vfio_device_info: { size: 20, argsz: 0, flags: 4, num_regions: 8, num_irqs: 12, cap_offset: 16 },
  vfio_region_info: { size: 32, argsz: 0, flags: 4, index: 8, cap_offset: 12, size_: 16, offset: 24 },
  vfio_region_info_cap_sparse_mmap: { size: 16, header: 0, nr_areas: 8, areas: 16 },
  vfio_region_sparse_mmap_area: { size: 16, offset: 0, size_: 8 },
  vfio_irq_info: { size: 16, argsz: 0, flags: 4, index: 8, count: 12 },
  vfio_irq_set: { size: 20, argsz: 0, flags: 4, index: 8, start: 12, count: 16, data: 20 },
} as const satisfies Record<string, StructLayout>;
