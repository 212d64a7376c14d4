// SPDX-License-Identifier: MIT
/*
 * kexec KERNEL INITRD CMDLINE: loads another kernel and goes there at once, with
 * devices and their mappings as they are but for what the kernel shuts down.
 */
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int kernel, initrd;

	if (argc != 4)
		return 2;
	kernel = open(argv[1], O_RDONLY);
	initrd = open(argv[2], O_RDONLY);
	if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(argv[3]) + 1, argv[3], 0L) ||
	    reboot(LINUX_REBOOT_CMD_KEXEC))
		perror("kexec");
	return 1;
}
