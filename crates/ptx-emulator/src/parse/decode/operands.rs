//! The operands of an instruction, one after the other.

use super::Result;
use crate::{
    isa::{Address, Guard, Operand},
    parse::{Argument, Target},
};

/// The operands of one instruction, taken from the left.
pub(super) struct Operands<'a> {
    pub(super) left: &'a [Argument],
}

impl<'a> Operands<'a> {
    pub(super) fn next(&mut self) -> Result<&'a Argument> {
        let (first, rest) = self.left.split_first().ok_or("an operand is missing")?;
        self.left = rest;
        Ok(first)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    pub(super) fn value(&mut self) -> Result<Operand> {
        value(self.next()?)
    }

    pub(super) fn register(&mut self) -> Result<u32> {
        match self.value()? {
            Operand::Register(number) => Ok(number),
            _ => Err("a destination is a register".into()),
        }
    }

    pub(super) fn immediate(&mut self) -> Result<u64> {
        match self.value()? {
            Operand::Immediate(number) => Ok(number),
            _ => Err("this operand is a number".into()),
        }
    }

    pub(super) fn guard(&mut self) -> Result<Guard> {
        match self.next()? {
            Argument::Predicate(guard) => Ok(*guard),
            _ => Err("this operand is a predicate".into()),
        }
    }

    pub(super) fn predicate(&mut self) -> Result<u32> {
        match self.guard()? {
            Guard { register, negated: false } => Ok(register),
            _ => Err("a destination is not negated".into()),
        }
    }

    pub(super) fn address(&mut self) -> Result<Address> {
        match self.next()? {
            Argument::Address(address) => Ok(*address),
            _ => Err("this operand is an address".into()),
        }
    }

    /// A vector, or one value where a vector of one is meant.
    pub(super) fn values(&mut self) -> Result<Vec<Operand>> {
        match self.next()? {
            Argument::Vector(parts) => parts.iter().map(value).collect(),
            one => Ok(vec![value(one)?]),
        }
    }

    pub(super) fn registers(&mut self) -> Result<Vec<Option<u32>>> {
        let parts = match self.next()? {
            Argument::Vector(parts) => parts.as_slice(),
            one => std::slice::from_ref(one),
        };
        let register = |part: &Argument| match part {
            Argument::Sink => Ok(None),
            Argument::Value(Operand::Register(number)) => Ok(Some(*number)),
            _ => Err("a destination is a register".to_string()),
        };
        parts.iter().map(register).collect()
    }

    /// `d` or `d|p`.
    pub(super) fn register_and_predicate(&mut self) -> Result<(Option<u32>, Option<u32>)> {
        match self.next()? {
            Argument::Pair(first, second) => {
                let register = match first {
                    None => None,
                    Some(Target::Register(register)) => Some(*register),
                    Some(Target::Predicate(_)) => return Err("a register stands before |".into()),
                };
                match second {
                    None => Ok((register, None)),
                    Some(Target::Predicate(predicate)) => Ok((register, Some(*predicate))),
                    Some(Target::Register(_)) => Err("a predicate stands behind |".into()),
                }
            }
            Argument::Value(Operand::Register(number)) => Ok((Some(*number), None)),
            _ => Err("a destination is a register".into()),
        }
    }
}

pub(super) fn value(argument: &Argument) -> Result<Operand> {
    match argument {
        Argument::Value(value) => Ok(*value),
        Argument::Label(name) => Err(format!("there is no {name}")),
        _ => Err("this operand is a register or a number".into()),
    }
}
