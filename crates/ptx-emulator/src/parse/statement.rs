//! One instruction as it is written: its predicate, its opcode, its operands.

use super::{Argument, Body, Name, Parser, Statement, Target, lexer::Kind};
use crate::{
    error::Error,
    isa::{Address, Guard, Operand, Special},
};

impl<'a> Parser<'a> {
    pub(super) fn statement(&mut self, body: &Body<'a>) -> Result<Statement<'a>, Error> {
        let first = self.next("an instruction")?;
        let mut guard = None;
        let mut opcode = first;
        if first.is(b'@') {
            let negated = self.take(b'!');
            let name = self.next("a predicate")?;
            let Some(Name::Predicate(register)) = self.lookup(body, name.text) else {
                return Err(self.error(name, "not a predicate that is declared here"));
            };
            guard = Some(Guard { register, negated });
            opcode = self.next("an opcode")?;
        }
        if guard.is_some() && opcode.text.starts_with("call") {
            return Err(self.error(opcode, "calls under a predicate are not implemented"));
        }
        if opcode.kind != Kind::Word {
            return Err(self.error(opcode, "an instruction begins with an opcode"));
        }
        let mut arguments = Vec::new();
        while !self.take(b';') {
            arguments.push(self.argument(body)?);
            if !self.take(b',') && !self.peek().is_some_and(|token| token.is(b';')) {
                let token = self.next("`;`")?;
                return Err(self.error(token, "`,` or `;` follows an operand"));
            }
        }
        let end = self.tokens[self.at - 1].start + 1;
        let text = self.source[first.start..end].split_whitespace().collect::<Vec<_>>().join(" ");
        let scopes = body.open.clone();
        Ok(Statement { guard, opcode: opcode.text, arguments, line: first.line, text, scopes })
    }

    fn argument(&mut self, body: &Body<'a>) -> Result<Argument, Error> {
        let token = self.next("an operand")?;
        let argument = match token.kind {
            Kind::Mark(b'[') => {
                let argument = self.address(body)?;
                if !self.take(b']') {
                    return Err(self.error(token, "an address ends with ]"));
                }
                return Ok(argument);
            }
            Kind::Mark(b'{') => {
                let mut parts = Vec::new();
                while !self.take(b'}') {
                    parts.push(self.argument(body)?);
                    self.take(b',');
                }
                return Ok(Argument::Vector(parts));
            }
            Kind::Mark(b'!') => match self.argument(body)? {
                Argument::Predicate(guard) => Argument::Predicate(Guard { negated: !guard.negated, ..guard }),
                _ => return Err(self.error(token, "only a predicate can be negated")),
            },
            Kind::Mark(b'-') => Argument::Value(Operand::Immediate(self.number()?.wrapping_neg())),
            Kind::Number => {
                self.at -= 1;
                Argument::Value(Operand::Immediate(self.number()?))
            }
            Kind::Word if token.text == "_" => Argument::Sink,
            Kind::Word => match (self.lookup(body, token.text), special(token.text)) {
                (Some(Name::Register(number)), _) => Argument::Value(Operand::Register(number)),
                (Some(Name::Predicate(register)), _) => {
                    Argument::Predicate(Guard { register, negated: false })
                }
                (Some(Name::Variable(address)), _) => {
                    let offset = if self.take(b'+') { self.number()? } else { 0 };
                    Argument::Value(Operand::Immediate(address.wrapping_add(offset)))
                }
                (Some(Name::DynamicShared), _) => {
                    Argument::Value(Operand::Special(Special::DynamicSharedBase))
                }
                (_, Some(special)) => Argument::Value(Operand::Special(special)),
                _ if token.text.starts_with('%') => {
                    return Err(self.error(token, "not a register that is declared or known here"));
                }
                // A label may stand further down.
                _ => Argument::Label(token.text.to_string()),
            },
            _ => return Err(self.error(token, "not an operand")),
        };
        if !self.take(b'|') {
            return Ok(argument);
        }
        let second = self.argument(body)?;
        match (target(&argument), target(&second)) {
            (Some(first), Some(second)) => Ok(Argument::Pair(first, second)),
            _ => Err(self.error(token, "only registers and predicates stand around |")),
        }
    }

    /// The inside of `[...]`.
    fn address(&mut self, body: &Body<'a>) -> Result<Argument, Error> {
        let token = self.tokens[self.at - 1];
        let Argument::Value(base) = self.argument(body)? else {
            return Err(self.error(token, "not an address that is known here"));
        };
        let mut offset = 0_i64;
        while self.take(b'+') {
            offset = offset.wrapping_add(self.number()? as i64);
        }
        let address = Address { base, offset };
        if self.take(b',') {
            return match self.argument(body)? {
                Argument::Vector(coordinates) => Ok(Argument::Tensor(address, coordinates)),
                _ => Err(self.error(token, "coordinates stand in braces")),
            };
        }
        Ok(Argument::Address(address))
    }

    pub(super) fn number(&mut self) -> Result<u64, Error> {
        let negative = self.take(b'-');
        let token = self.next("a number")?;
        let text = token.text.trim_end_matches('U');
        let value = match text.get(..2) {
            Some("0x" | "0X") => u64::from_str_radix(&text[2..], 16).ok(),
            Some("0f" | "0F" | "0d" | "0D") => u64::from_str_radix(&text[2..], 16).ok(),
            Some("0b" | "0B") => u64::from_str_radix(&text[2..], 2).ok(),
            _ if text.contains('.') => text.parse::<f64>().ok().map(f64::to_bits),
            _ => text.parse().ok(),
        };
        let value = value.filter(|_| token.kind == Kind::Number);
        let value = value.ok_or_else(|| self.error(token, "not a number"))?;
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    pub(super) fn lookup(&self, body: &Body<'a>, name: &str) -> Option<Name> {
        let local = body.open.iter().rev().find_map(|scope| body.scopes[*scope].get(name));
        local.or_else(|| self.globals.get(name)).copied().filter(|name| !matches!(name, Name::Label(_)))
    }
}

/// The registers that operands name.
pub(super) fn named(arguments: &[Argument]) -> Vec<u32> {
    let mut found = Vec::new();
    for argument in arguments {
        match argument {
            Argument::Value(Operand::Register(number))
            | Argument::Address(Address { base: Operand::Register(number), .. }) => found.push(*number),
            Argument::Vector(parts) | Argument::Tensor(_, parts) => found.extend(named(parts)),
            Argument::Pair(first, second) => {
                let register = |half: &Option<Target>| match half {
                    Some(Target::Register(register)) => Some(*register),
                    _ => None,
                };
                found.extend([first, second].into_iter().filter_map(register));
            }
            _ => {}
        }
    }
    found
}

fn target(argument: &Argument) -> Option<Option<Target>> {
    match argument {
        Argument::Value(Operand::Register(number)) => Some(Some(Target::Register(*number))),
        Argument::Predicate(Guard { register, negated: false }) => Some(Some(Target::Predicate(*register))),
        Argument::Sink => Some(None),
        _ => None,
    }
}

fn special(name: &str) -> Option<Special> {
    let (name, axis) = match name.rsplit_once('.') {
        Some((name, "x")) => (name, Some(0)),
        Some((name, "y")) => (name, Some(1)),
        Some((name, "z")) => (name, Some(2)),
        _ => (name, None),
    };
    Some(match (name, axis) {
        ("%tid", Some(axis)) => Special::Tid(axis),
        ("%ntid", Some(axis)) => Special::Ntid(axis),
        ("%ctaid", Some(axis)) => Special::Ctaid(axis),
        ("%nctaid", Some(axis)) => Special::Nctaid(axis),
        ("%clusterid", Some(axis)) => Special::Clusterid(axis),
        ("%nclusterid", Some(axis)) => Special::Nclusterid(axis),
        ("%cluster_ctaid", Some(axis)) => Special::ClusterCtaid(axis),
        ("%cluster_nctaid", Some(axis)) => Special::ClusterNctaid(axis),
        ("%cluster_ctarank", None) => Special::ClusterCtarank,
        ("%cluster_nctarank", None) => Special::ClusterNctarank,
        ("%is_explicit_cluster", None) => Special::ExplicitCluster,
        ("%laneid", None) => Special::Laneid,
        ("%warpid", None) => Special::Warpid,
        ("%nwarpid", None) => Special::Nwarpid,
        ("%lanemask_eq", None) => Special::LanemaskEq,
        ("%lanemask_lt", None) => Special::LanemaskLt,
        ("%lanemask_le", None) => Special::LanemaskLe,
        ("%lanemask_gt", None) => Special::LanemaskGt,
        ("%lanemask_ge", None) => Special::LanemaskGe,
        ("%clock" | "%clock64" | "%globaltimer", None) => Special::Clock,
        ("%smid", None) => Special::Smid,
        ("%dynamic_smem_size", None) => Special::DynamicSharedBytes,
        ("%total_smem_size", None) => Special::TotalSharedBytes,
        _ => return None,
    })
}
