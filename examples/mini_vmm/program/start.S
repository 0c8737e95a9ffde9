/*
 * Each vCPU begins here, in 64-bit mode, with its number in RDI. The first instructions give it a
 * stack; the rest is in main.c.
 */
	.globl start
	.section .text.start, "ax"
start:
	mov	%rdi, %rax
	inc	%rax
	shl	$14, %rax
	lea	stacks(%rax), %rsp
	xor	%ebp, %ebp
	call	main
1:	hlt
	jmp	1b

	.bss
	.balign	16
stacks:
	.skip	16 << 14
	.section .note.GNU-stack, "", @progbits
