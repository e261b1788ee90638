//! Registers that `wgmma` reads and writes on its own: whose they are, and whether `wgmma.fence` stands
//! between their other uses and it.
//!
//! The manual wants a fence before the first product, and between any other access to a register of a product
//! and that product. nvcc moves arithmetic on registers across the fences of inline assembly, and ptxas puts that
//! right, so what can be asked here is less: a fence since the products before were committed. A `mov` is
//! taken for another name of what it copies.

use super::Warp;
use crate::{
    error::{Hazard, Stop},
    isa::{Instruction, Op, Operand},
};

/// How a register was used last.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    /// The last product that it belongs to, and that product's columns, or 0 where it only reads.
    owner: u32,
    owner_columns: u32,
    /// What happened to it since this many fences.
    fences: u32,
    since: Since,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Since {
    #[default]
    Nothing,
    /// An instruction of the thread.
    Touched,
    /// A product with so many columns added to it.
    Product(u32),
}

/// The registers of a warp, in kernels that have products.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    uses: Vec<Use>,
    /// Products issued, and the last that was waited for.
    pub(super) issued: u32,
    finished: u32,
    fences: u32,
    /// Whether a fence came since the last commit.
    fenced: bool,
}

impl Fragments {
    pub(super) fn new(registers: usize) -> Self {
        Self { uses: vec![Use::default(); registers], ..Self::default() }
    }

    pub(super) fn fence(&mut self) {
        self.fences += 1;
        self.fenced = true;
    }

    pub(super) fn commit(&mut self) {
        self.fenced = false;
    }

    pub(super) fn finish(&mut self, product: u32) {
        self.finished = self.finished.max(product);
    }

    fn since(&self, register: u32) -> Since {
        let known = self.uses[register as usize];
        if known.fences == self.fences { known.since } else { Since::Nothing }
    }

    fn set(&mut self, register: u32, since: Since) {
        let known = &mut self.uses[register as usize];
        (known.fences, known.since) = (self.fences, since);
    }

    /// Issues a product that adds to some registers and reads others.
    pub(super) fn issue(&mut self, columns: u32, adds: &[u32], reads: &[u32]) -> Result<(), String> {
        if self.fences == 0 {
            return Err("no wgmma.fence stands before the first product".into());
        }
        let mine = adds.iter().map(|register| (*register, columns));
        for (register, columns) in mine.clone().chain(reads.iter().map(|register| (*register, 0))) {
            let known = self.uses[register as usize];
            if known.owner > self.finished && known.owner_columns != columns {
                return Err("a register belongs to another wgmma that nobody has waited for".into());
            }
            match self.since(register) {
                Since::Touched if !self.fenced => {
                    return Err(
                        "a register was used since the products before, and no wgmma.fence stands between"
                            .into(),
                    );
                }
                Since::Product(others) if others != columns => {
                    return Err(format!(
                        "a register was used by a product of {others} columns, and no wgmma.fence stands between"
                    ));
                }
                _ => {}
            }
        }
        self.issued += 1;
        for (register, columns) in mine {
            self.set(register, Since::Product(columns));
            let known = &mut self.uses[register as usize];
            (known.owner, known.owner_columns) = (self.issued, columns);
        }
        for register in reads {
            self.set(*register, Since::Nothing);
            let known = &mut self.uses[*register as usize];
            (known.owner, known.owner_columns) = (self.issued, 0);
        }
        Ok(())
    }
}

impl Warp {
    /// Notes which registers an instruction uses, if there are products that might mind.
    #[inline]
    pub(super) fn note_registers(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let fragments = &mut self.fragments;
        if fragments.uses.is_empty() || matches!(instruction.op, Op::Product(_)) {
            return Ok(());
        }
        let is_taken = |register: &u32| fragments.uses[*register as usize].owner > fragments.finished;
        if fragments.issued > fragments.finished && instruction.registers.iter().any(is_taken) {
            let message = "a register of this instruction belongs to a wgmma that nobody has waited for";
            return Err(Stop::new(Hazard::Async, 0, message));
        }
        match &instruction.op {
            Op::Unary { d, a, .. } if instruction.moves => {
                let since = match a {
                    Operand::Register(a) if fragments.since(*a) == Since::Touched => Since::Touched,
                    _ => Since::Nothing,
                };
                fragments.set(*d, since);
            }
            _ => {
                for register in &instruction.registers {
                    fragments.set(*register, Since::Touched);
                }
            }
        }
        Ok(())
    }
}
