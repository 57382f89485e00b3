//! Runs the machine code of the AMX path on processors without AMX, for tests. Such a processor raises an invalid-opcode exception at
//! each tile instruction. The signal handler here decodes the instruction and computes it by the portable twin.
//!
//! Encodings: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::Once;

use super::tiles::{TILE_SIZE, TileTwin, Tiles};

const SIGILL: c_int = 4;

/// The kernel's `struct sigaction` as the C library of x86-64 Linux declares it.
#[repr(C)]
struct SigAction {
    handler: extern "C" fn(c_int, *mut c_void, *mut c_void),
    mask: [u64; 16],
    flags: c_int,
    restorer: usize,
}

unsafe extern "C" {
    fn sigaction(signal: c_int, new: *const SigAction, old: *mut SigAction) -> c_int;
}

/// The tile registers of a thread.
struct Registers {
    is_configured: bool,
    tiles: [[[u32; TILE_SIZE]; TILE_SIZE]; 8],
}

thread_local! {
    static REGISTERS: RefCell<Registers> =
        const { RefCell::new(Registers { is_configured: false, tiles: [[[0; TILE_SIZE]; TILE_SIZE]; 8] }) };
}

/// From now on, tile instructions that the processor does not have are emulated in this process.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    const SA_SIGINFO: c_int = 4;
    INSTALLED.call_once(|| {
        let action = SigAction { handler: on_invalid_opcode, mask: [0; 16], flags: SA_SIGINFO, restorer: 0 };
        // SAFETY: the structure is the C library's. The handler touches only this thread's registers and the memory that the
        // instruction names.
        let result = unsafe { sigaction(SIGILL, &raw const action, std::ptr::null_mut()) };
        assert_eq!(result, 0, "cannot install a signal handler");
    });
}

/// Emulates the instruction at the instruction pointer, or ends the process.
extern "C" fn on_invalid_opcode(_: c_int, _: *mut c_void, context: *mut c_void) {
    /// Offset of the general registers in `ucontext_t`.
    const GREGS: usize = 40;
    const RIP: usize = 16;
    // SAFETY: the kernel passes a `ucontext_t`. Its general registers are 23 words.
    unsafe {
        let registers = context.cast::<u8>().add(GREGS).cast::<u64>();
        let at = *registers.add(RIP) as *const u8;
        match emulate(at, |number| *registers.add(GREG_OF[number])) {
            Some(length) => *registers.add(RIP) += length as u64,
            None => {
                let bytes: [u8; 8] = at.cast::<[u8; 8]>().read_unaligned();
                eprintln!("not an emulated instruction, or tiles that are not configured: {bytes:02x?}");
                std::process::abort();
            }
        }
    }
}

/// Index in `ucontext_t` of each register, by its number in instructions: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
const GREG_OF: [usize; 16] = [13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];

/// Emulates one instruction and returns its length. `None` if it is not a tile instruction, or not allowed in this state.
///
/// # Safety
/// The instruction could be executed here: its memory operand is valid.
unsafe fn emulate(at: *const u8, register: impl Fn(usize) -> u64) -> Option<usize> {
    // SAFETY: an instruction that begins with C4 and has a ModRM byte has at least five bytes.
    let [vex, inverted, vector, opcode, modrm] = unsafe { at.cast::<[u8; 5]>().read_unaligned() };
    // Three-byte VEX prefix, opcode map 0F38, W 0, 128 bits.
    if vex != 0xc4 || inverted & 0x1f != 2 || vector & 0x84 != 0 {
        return None;
    }
    let (prefix, third) = (vector & 3, usize::from(!vector >> 3 & 15));
    let (mode, middle, last) = (modrm >> 6, usize::from(modrm >> 3 & 7), usize::from(modrm & 7));
    REGISTERS.with_borrow_mut(|state| {
        if mode == 3 {
            match (opcode, prefix) {
                (0x49, 0) if modrm == 0xc0 => state.is_configured = false, // tilerelease
                _ if !state.is_configured => return None,
                (0x49, 3) if last == 0 => state.tiles[middle] = [[0; TILE_SIZE]; TILE_SIZE], // tilezero
                (0x5c, 2) => state.dot(false, [middle, last, third]),                        // tdpbf16ps
                (0x5e, 1) => state.dot(true, [middle, last, third]),                         // tdpbusd
                _ => return None,
            }
            return Some(5);
        }
        // A memory operand: base, or base and index, and a displacement.
        let extended = |number: usize, bit: u8| number + if inverted >> bit & 1 == 0 { 8 } else { 0 };
        // SAFETY: as above; the bytes are part of the instruction.
        let byte = |i: usize| unsafe { *at.add(i) };
        let (base, index, length) = match last {
            4 => {
                let sib = byte(5);
                let index = extended(usize::from(sib >> 3 & 7), 6);
                (extended(usize::from(sib & 7), 5), (index != 4).then(|| register(index) << (sib >> 6)), 6)
            }
            _ => (extended(last, 5), None, 5),
        };
        let (displacement, length) = match mode {
            0 if base & 7 == 5 => return None,
            0 => (0, length),
            1 => (i64::from(byte(length).cast_signed()), length + 1),
            _ => {
                let bytes = std::array::from_fn(|i| byte(length + i));
                (i64::from(i32::from_le_bytes(bytes)), length + 4)
            }
        };
        let address = register(base).wrapping_add_signed(displacement);
        // SAFETY: the instruction accesses this memory. All rows have 64 bytes.
        unsafe {
            match (opcode, prefix, index) {
                (0x49, 0, None) if middle == 0 && !state.is_configured => {
                    // ldtilecfg: palette 1, 8 tiles of 16 rows of 64 bytes
                    let config = (address as *const [u8; 64]).read_unaligned();
                    let expected = |i: usize| match i {
                        0 => 1,
                        16..32 if i.is_multiple_of(2) => 64,
                        48..56 => 16,
                        _ => 0,
                    };
                    if (0..64).any(|i| config[i] != expected(i)) {
                        return None;
                    }
                    *state = Registers { is_configured: true, tiles: [[[0; TILE_SIZE]; TILE_SIZE]; 8] };
                }
                (0x4b, 1 | 3, Some(stride)) if state.is_configured => {
                    // tileloadd and tileloaddt1
                    for (i, row) in state.tiles[middle].iter_mut().enumerate() {
                        *row = (address.wrapping_add(i as u64 * stride) as *const [u32; TILE_SIZE]).read_unaligned();
                    }
                }
                (0x4b, 2, Some(stride)) if state.is_configured => {
                    // tilestored
                    for (i, row) in state.tiles[middle].iter().enumerate() {
                        (address.wrapping_add(i as u64 * stride) as *mut [u32; TILE_SIZE]).write_unaligned(*row);
                    }
                }
                _ => return None,
            }
        }
        Some(length)
    })
}

impl Registers {
    fn dot(&mut self, int8: bool, [sums, a, b]: [usize; 3]) {
        let mut twin = TileTwin::new();
        // SAFETY: each tile has 16 rows of 16 words without gaps.
        unsafe {
            twin.load::<0>(self.tiles[sums].as_flattened().as_ptr(), TILE_SIZE);
            twin.load::<1>(self.tiles[a].as_flattened().as_ptr(), TILE_SIZE);
            twin.load::<2>(self.tiles[b].as_flattened().as_ptr(), TILE_SIZE);
            if int8 {
                twin.dot_int8::<0, 1, 2>()
            } else {
                twin.dot_bf16::<0, 1, 2>()
            }
            twin.store::<0>(self.tiles[sums].as_flattened_mut().as_mut_ptr(), TILE_SIZE);
        }
    }
}
