/* SPDX-License-Identifier: MIT */
/*
 * What the host's kernel alone costs, without a VMM: an exit to user space and back,
 * and a page mapped and unmapped through VFIO. No program on this host is faster.
 *
 *	bounds exit			a guest that makes calls for ever, each refused
 *	bounds vfio GROUP BDF		/dev/vfio/GROUP
 *
 * Prints lines `NAME NANOSECONDS…', a figure for each of ROUNDS rounds; `exit' also a
 * line `cycles', the time stamp counter's in a millisecond.
 */
#include "pvdma_abi.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define PAGE		4096ul
#define LIST		64u
#define ROUNDS		5u
#define BATCH		16u
#define ROUND_NS	500000000ul

static void check(int failed, const char *what)
{
	if (!failed)
		return;
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000000000ul + at.tv_nsec;
}

/* Repeats a function for so long, ROUNDS times, and prints what one call took. */
static void measure(const char *name, void (*once)(void))
{
	unsigned int round, i;

	once();
	printf("%s", name);
	for (round = 0; round < ROUNDS; round++) {
		uint64_t start = now(), end;
		unsigned long count = 0;

		do {
			/* to look at the clock takes a good part of what is measured */
			for (i = 0; i < BATCH; i++)
				once();
			count += BATCH;
			end = now();
		} while (end - start < ROUND_NS);
		printf(" %lu", (unsigned long)((end - start) / count));
	}
	printf("\n");
	fflush(stdout);
}

static int container;
static char *memory;

static void map(uint64_t iova, char *at)
{
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map), .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)at, .iova = iova, .size = PAGE,
	};

	check(ioctl(container, VFIO_IOMMU_MAP_DMA, &map), "VFIO_IOMMU_MAP_DMA");
}

static void unmap(uint64_t iova, uint64_t bytes)
{
	struct vfio_iommu_type1_dma_unmap unmap = {
		.argsz = sizeof(unmap), .iova = iova, .size = bytes,
	};

	check(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap), "VFIO_IOMMU_UNMAP_DMA");
}

static void pair(void)
{
	map(1 << 20, memory);
	unmap(1 << 20, PAGE);
}

static void list(void)
{
	unsigned int i;

	for (i = 0; i < LIST; i++)
		map((1 << 20) + i * PAGE, memory + 2 * i * PAGE);
	unmap(1 << 20, LIST * PAGE);
}

static void vfio(const char *group_name, const char *bdf)
{
	char path[64];
	int group;

	snprintf(path, sizeof(path), "/dev/vfio/%s", group_name);
	container = open("/dev/vfio/vfio", O_RDWR);
	check(container < 0, "/dev/vfio/vfio");
	group = open(path, O_RDWR);
	check(group < 0, path);
	check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "VFIO_GROUP_SET_CONTAINER");
	check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");
	check(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bdf) < 0, bdf);
	memory = mmap(NULL, 2 * LIST * PAGE, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	check(memory == MAP_FAILED, "mmap");
	measure("vfio-pair", pair);
	measure("vfio-list", list);
}

static void cycles(void)
{
	uint64_t start = now(), first = __rdtsc();

	while (now() - start < ROUND_NS)
		;
	printf("cycles %llu\n", (__rdtsc() - first) * 1000000 / (now() - start));
}

static int vcpu;
static struct kvm_run *run;

/* Looks at a call as little as it can be looked at, and refuses it: a handle that is nobody's. */
static void leave(void)
{
	struct kvm_regs *regs = &run->s.regs.regs;

	check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
	if (run->exit_reason != KVM_EXIT_IO || run->io.port != PVDMA_PORT || run->io.size != 4 ||
	    run->s.regs.sregs.ss.dpl != 0 || regs->rax != PVDMA_CALL_UNMAP || regs->rdi != 0) {
		fprintf(stderr, "exit reason %u, call %llu: not the call that is made here\n",
			run->exit_reason, regs->rax);
		exit(1);
	}
	regs->rax = PVDMA_STATUS_INVALID | ENODEV << 8;
	run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
}

/*
 * A guest that makes calls and does nothing else, as test/guest/exits.c does under our VMM; in
 * real mode, which is less to set up. l: mov $PVDMA_CALL_UNMAP, %eax; out %eax, (%dx); jmp l
 */
static void exits(void)
{
	static const uint8_t code[] = { 0x66, 0xb8, PVDMA_CALL_UNMAP, 0, 0, 0, 0x66, 0xef, 0xeb, 0xf6 };
	struct kvm_userspace_memory_region region = { .memory_size = 16 * PAGE };
	struct kvm_regs regs = { .rflags = 2, .rdx = PVDMA_PORT, .rip = PAGE, .rsi = PAGE, .r8 = PAGE };
	struct kvm_sregs sregs;
	int kvm = open("/dev/kvm", O_RDWR);
	int vm, size;

	check(kvm < 0, "/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	check(vm < 0, "KVM_CREATE_VM");
	memory = mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(memory == MAP_FAILED, "mmap");
	memcpy(memory + PAGE, code, sizeof(code));
	region.userspace_addr = (uintptr_t)memory;
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	check(vcpu < 0, "KVM_CREATE_VCPU");
	size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	check(run == MAP_FAILED, "mmap");
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	measure("exit", leave);
	cycles();
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "exit"))
		exits();
	else if (argc == 4 && !strcmp(argv[1], "vfio"))
		vfio(argv[2], argv[3]);
	else
		return 2;
	return 0;
}
