//! Declarations: registers, variables of each space, extents.

use super::{Body, Name, Parser, lexer::Kind, round_up};
use crate::{error::Error, isa::Type, parse::Variable};

#[derive(Clone, Debug)]
pub(super) struct Declared {
    pub(super) name: String,
    pub(super) ty: Type,
    pub(super) align: u64,
    pub(super) bytes: u64,
}

impl<'a> Parser<'a> {
    /// `.reg .b32 %r<10>;` or `.reg .pred p, q;`.
    pub(super) fn registers(&mut self, body: &mut Body<'a>) -> Result<(), Error> {
        let word = self.next("a type")?;
        let ty = Type::parse(word.text.trim_start_matches('.'));
        let Some(ty) = ty.filter(|ty| *ty != Type::B128) else {
            return Err(self.error(word, "not a register type that is known here"));
        };
        loop {
            let name = self.next("a register")?.text;
            let mut names = vec![name.to_string()];
            if self.take(b'<') {
                let count = self.next("a count")?;
                let Ok(number) = count.text.parse::<u32>() else {
                    return Err(self.error(count, "a count of registers is a number"));
                };
                if !self.take(b'>') {
                    return Err(self.error(count, "the count of registers ends with >"));
                }
                names = (0..number).map(|n| format!("{name}{n}")).collect();
            }
            for name in names {
                let count = if ty == Type::Pred { &mut body.predicates } else { &mut body.registers };
                let number = *count;
                *count += 1;
                let register =
                    if ty == Type::Pred { Name::Predicate(number) } else { Name::Register(number) };
                body.declare(name, register);
            }
            if self.take(b';') {
                return Ok(());
            }
            if !self.take(b',') {
                let token = self.next("`,` or `;`")?;
                return Err(self.error(token, "`,` or `;` follows a register"));
            }
        }
    }

    /// A variable of module scope, with its initial value.
    pub(super) fn variable(&mut self) -> Result<(), Error> {
        let space = self.next("a state space")?;
        let declared = self.declared()?;
        if space.text == ".shared" && declared.bytes == 0 {
            self.dynamic_align = self.dynamic_align.max(declared.align as u32);
            self.globals.insert(declared.name, Name::DynamicShared);
            return self.skip_past(b';');
        }
        if space.text == ".shared" {
            let at = round_up(u64::from(self.shared_bytes), declared.align);
            self.shared_bytes = (at + declared.bytes) as u32;
            self.globals.insert(declared.name, Name::Variable(at));
            return self.skip_past(b';');
        }
        let mut bytes = vec![0; declared.bytes as usize];
        if self.take(b'=') {
            let braces = self.take(b'{');
            let element = declared.ty.bytes() as usize;
            let mut at = 0;
            loop {
                let value = self.number()?;
                let Some(place) = bytes.get_mut(at..at + element) else {
                    return Err(self.error(space, "more initial values than elements"));
                };
                place.copy_from_slice(&value.to_le_bytes()[..element]);
                at += element;
                if !self.take(b',') {
                    break;
                }
            }
            if braces && !self.take(b'}') {
                return Err(self.error(space, "initial values end with }"));
            }
        }
        if !self.take(b';') {
            return Err(self.error(space, "a variable ends with ;"));
        }
        let address = round_up(self.next_address, declared.align.max(256));
        self.next_address = address + declared.bytes + 256;
        self.globals.insert(declared.name, Name::Variable(address));
        self.module.variables.push(Variable { address, bytes });
        Ok(())
    }

    /// `.align 8 .b8 name[184]`, behind the state space.
    pub(super) fn declared(&mut self) -> Result<Declared, Error> {
        let mut align = None;
        let ty = loop {
            let token = self.next("a type")?;
            match token.text {
                ".align" => align = Some(self.number()?),
                ".ptr" | ".global" | ".const" | ".shared" | ".local" | ".managed" => {}
                ".attribute" => self.skip_past(b')')?,
                ".v2" | ".v4" => return Err(self.error(token, "vector variables are not implemented")),
                text => match Type::parse(text.trim_start_matches('.')) {
                    Some(ty) => break ty,
                    None => return Err(self.error(token, "not a type that is known here")),
                },
            }
        };
        // `.param .u64 .ptr .global .align 1 name` puts the pointer's properties behind the type.
        let mut name = self.next("a name")?;
        while matches!(name.text, ".ptr" | ".global" | ".const" | ".shared" | ".local" | ".align") {
            if name.text == ".align" {
                self.number()?;
            }
            name = self.next("a name")?;
        }
        let mut bytes = u64::from(ty.bytes());
        while self.take(b'[') {
            if self.take(b']') {
                bytes = 0;
                continue;
            }
            bytes = bytes.saturating_mul(self.number()?);
            if !self.take(b']') {
                return Err(self.error(name, "a dimension ends with ]"));
            }
        }
        if name.kind != Kind::Word || bytes > 1 << 30 {
            return Err(self.error(name, "not a variable of a size that is possible"));
        }
        let align = align.unwrap_or(u64::from(ty.bytes()));
        if !align.is_power_of_two() {
            return Err(self.error(name, "an alignment is a power of two"));
        }
        Ok(Declared { name: name.text.to_string(), ty, align, bytes })
    }

    pub(super) fn extents(&mut self) -> Result<[u32; 3], Error> {
        let mut extents = [1; 3];
        for extent in &mut extents {
            *extent = self.number()? as u32;
            if !self.take(b',') {
                break;
            }
        }
        Ok(extents)
    }
}
