//! PTX text to kernels: declarations, scopes, labels. What an opcode means is decided in [`decode`].

mod call;
mod decode;
mod lexer;

use std::collections::HashMap;

use self::lexer::{Kind, Token};
use crate::{
    error::Error,
    exec::{self, Class},
    isa::{Address, Guard, Instruction, Op, Operand, Special, Type},
};

/// A loaded module.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) kernels: Vec<Kernel>,
    /// Variables in global and const space.
    pub(crate) variables: Vec<Variable>,
}

/// A variable of a module with the address that it was given.
#[derive(Debug)]
pub(crate) struct Variable {
    pub(crate) address: u64,
    /// Its initial bytes; all zero where the text gives none.
    pub(crate) bytes: Vec<u8>,
}

/// An entry point.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// Where its `.entry` stands.
    pub(crate) line: u32,
    pub(crate) instructions: Vec<Instruction>,
    pub(crate) param_bytes: u32,
    pub(crate) registers: u32,
    pub(crate) predicates: u32,
    /// Shared memory that the text declares.
    pub(crate) shared_bytes: u32,
    /// Alignment of the launch's own shared memory.
    pub(crate) dynamic_align: u32,
    /// Local memory of each thread.
    pub(crate) local_bytes: u32,
    /// Param space of each thread, for calls, and where it begins.
    pub(crate) call_bytes: u32,
    pub(crate) calls_at: u32,
    /// Registers that each thread begins with, where the entry bounds them; else 0.
    pub(crate) launch_registers: u32,
    /// Whether it multiplies with `wgmma`.
    pub(crate) has_products: bool,
    /// `.reqntid`.
    pub(crate) required_threads: Option<[u32; 3]>,
    /// `.maxntid`, as a count.
    pub(crate) most_threads: Option<u32>,
    /// `.reqnctapercluster`.
    pub(crate) required_cluster: Option<[u32; 3]>,
    /// `.maxclusterrank`.
    pub(crate) most_ctas: Option<u32>,
}

/// Versions of the PTX language whose meaning is known here.
const VERSIONS: std::ops::RangeInclusive<(u32, u32)> = (6, 0)..=(9, 0);

/// Registers of a multiprocessor, and the most that a thread can have.
const REGISTERS: u64 = 1 << 16;
const MOST_REGISTERS: u64 = 255;

/// Where the module's variables begin.
pub(crate) fn parse(source: &str, variables_at: u64) -> Result<Module, Error> {
    let tokens = lexer::tokens(source)?;
    let module = Module { kernels: Vec::new(), variables: Vec::new() };
    let mut parser = Parser {
        source,
        tokens: &tokens,
        at: 0,
        module,
        next_address: variables_at,
        globals: HashMap::new(),
        functions: HashMap::new(),
        shared_bytes: 0,
        dynamic_align: 16,
    };
    parser.module()?;
    Ok(parser.module)
}

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
enum Name {
    Register(u32),
    Predicate(u32),
    /// The address of a variable, in its own space.
    Variable(u64),
    /// Where the launch's own shared memory begins: behind all that the text declares.
    DynamicShared,
    Label(u32),
}

struct Parser<'a> {
    source: &'a str,
    tokens: &'a [Token<'a>],
    at: usize,
    module: Module,
    next_address: u64,
    /// Names of module scope.
    globals: HashMap<String, Name>,
    functions: HashMap<String, call::Function>,
    /// Shared memory of module scope, which every kernel has.
    shared_bytes: u32,
    dynamic_align: u32,
}

/// An operand as written.
#[derive(Clone, Debug)]
pub(super) enum Argument {
    Value(Operand),
    Predicate(Guard),
    /// `p|q`, either of which may be the sink.
    Pair(Option<Target>, Option<Target>),
    Address(Address),
    Vector(Vec<Self>),
    /// `[map, {x, y}]`.
    Tensor(Address, Vec<Self>),
    Label(String),
    Sink,
}

/// One half of `p|q`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    Register(u32),
    Predicate(u32),
}

/// An instruction before the labels after it are known.
struct Statement<'a> {
    guard: Option<Guard>,
    opcode: &'a str,
    arguments: Vec<Argument>,
    line: u32,
    text: String,
    /// The scopes that its labels are looked up in, innermost last.
    scopes: Vec<usize>,
}

/// The declarations of a kernel as they accumulate.
struct Body<'a> {
    scopes: Vec<HashMap<String, Name>>,
    /// Scopes that are open, innermost last.
    open: Vec<usize>,
    statements: Vec<Statement<'a>>,
    tables: HashMap<String, Vec<String>>,
    registers: u32,
    predicates: u32,
    shared_bytes: u32,
    local_bytes: u32,
    /// Where the next variable of param space may lie.
    param_bytes: u64,
    /// The functions that stand here in place of calls, innermost last.
    calls: Vec<String>,
    /// Shared memory that functions declare: once, however often they are called.
    function_shared: HashMap<[String; 2], u64>,
}

impl<'a> Parser<'a> {
    fn module(&mut self) -> Result<(), Error> {
        self.functions()?;
        self.header()?;
        while let Some(token) = self.peek() {
            match token.text {
                ".visible" | ".extern" | ".weak" | ".common" => self.at += 1,
                ".entry" => self.entry()?,
                ".func" => {
                    self.at += 1;
                    if self.function()?.1.has_body() {
                        self.at -= 1;
                        self.skip_braces()?;
                    }
                }
                ".global" | ".const" | ".shared" => self.variable()?,
                ".section" => {
                    self.at += 2;
                    self.skip_braces()?;
                }
                ".pragma" => self.skip_past(b';')?,
                _ => return Err(self.error(token, "not a declaration that is known here")),
            }
        }
        Ok(())
    }

    fn header(&mut self) -> Result<(), Error> {
        let first = self.next("a module begins with .version")?;
        if first.text != ".version" {
            return Err(self.error(first, "a module begins with .version"));
        }
        let version = self.next("a version")?;
        let numbers =
            version.text.split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match numbers {
            Some(numbers) if VERSIONS.contains(&numbers) => {}
            _ => return Err(self.error(version, "PTX versions from 6.0 to 9.0 are known here, not this one")),
        }
        let target = self.next(".target")?;
        if target.text != ".target" {
            return Err(self.error(target, ".target follows .version"));
        }
        let architecture = self.next("an architecture")?;
        let number = architecture.text.strip_prefix("sm_").map(|text| text.trim_end_matches(['a', 'f']));
        if !number.and_then(|text| text.parse::<u32>().ok()).is_some_and(|sm| (50..=90).contains(&sm)) {
            return Err(self.error(architecture, "targets from sm_50 to sm_90a are known here, not this one"));
        }
        while self.peek().is_some_and(|token| token.is(b',')) {
            self.at += 2;
        }
        let size = self.next(".address_size")?;
        let bits = self.next("64")?;
        if size.text != ".address_size" || bits.text != "64" {
            return Err(self.error(size, "the module needs .address_size 64"));
        }
        Ok(())
    }

    fn entry(&mut self) -> Result<(), Error> {
        self.at += 1;
        let named = self.next("a name")?;
        if named.kind != Kind::Word {
            return Err(self.error(named, "an entry has a name"));
        }
        let (name, line) = (named.text.to_string(), named.line);
        let mut body = Body {
            scopes: vec![HashMap::new()],
            open: vec![0],
            statements: Vec::new(),
            tables: HashMap::new(),
            registers: 0,
            predicates: 0,
            shared_bytes: self.shared_bytes,
            local_bytes: 0,
            param_bytes: 0,
            calls: Vec::new(),
            function_shared: HashMap::new(),
        };
        let mut param_bytes = 0_u64;
        if self.take(b'(') {
            for declared in self.parameters()? {
                param_bytes = round_up(param_bytes, declared.align);
                body.scopes[0].insert(declared.name, Name::Variable(param_bytes));
                param_bytes += declared.bytes;
            }
        }
        let calls_at = round_up(param_bytes, 16);
        body.param_bytes = calls_at;
        let (mut required_threads, mut most_threads) = (None, None);
        let (mut required_cluster, mut most_ctas) = (None, None);
        let (mut most_registers, mut least_ctas) = (None, 1);
        loop {
            let token = self.next("the body of the kernel")?;
            match token.text {
                "{" => break,
                ".maxntid" => most_threads = Some(self.extents()?.iter().product()),
                ".reqntid" => required_threads = Some(self.extents()?),
                ".minnctapersm" => least_ctas = self.number()?.max(1),
                ".maxnreg" => most_registers = Some(self.number()? as u32),
                ".reqnctapercluster" => required_cluster = Some(self.extents()?),
                ".maxclusterrank" => most_ctas = Some(self.number()? as u32),
                ".explicitcluster" | ".noreturn" => {}
                ".pragma" => self.skip_past(b';')?,
                ";" => return Ok(()),
                _ => return Err(self.error(token, "not a directive of an entry that is known here")),
            }
        }
        self.body(&mut body)?;
        let instructions = resolve(&body)?;
        let threads = most_threads.or(required_threads.map(|extents| extents.iter().product::<u32>()));
        let fitting = threads.map(|threads| {
            let all = u64::from(threads.next_multiple_of(32)) * least_ctas;
            (REGISTERS / all.max(1)).min(MOST_REGISTERS) as u32 / 8 * 8
        });
        let launch_registers = most_registers.or(fitting);
        let adjusts = |instruction: &&Instruction| matches!(instruction.op, Op::SetRegisters { .. });
        if let (None, Some(adjusts)) = (launch_registers, instructions.iter().find(adjusts)) {
            return Err(Error::Parse {
                line: adjusts.line,
                text: adjusts.text.clone(),
                reason: "setmaxnreg needs an entry with .maxntid, .reqntid or .maxnreg".into(),
            });
        }
        self.module.kernels.push(Kernel {
            name,
            line,
            launch_registers: launch_registers.unwrap_or(0),
            has_products: instructions.iter().any(|instruction| matches!(instruction.op, Op::Product(_))),
            instructions,
            param_bytes: param_bytes as u32,
            registers: body.registers,
            predicates: body.predicates,
            shared_bytes: body.shared_bytes,
            dynamic_align: self.dynamic_align,
            local_bytes: body.local_bytes,
            call_bytes: (body.param_bytes - calls_at) as u32,
            calls_at: calls_at as u32,
            required_threads,
            most_threads,
            required_cluster,
            most_ctas,
        });
        Ok(())
    }

    fn body(&mut self, body: &mut Body<'a>) -> Result<(), Error> {
        loop {
            let token = self.next("the end of the kernel")?;
            match token.text {
                "{" => {
                    body.scopes.push(HashMap::new());
                    body.open.push(body.scopes.len() - 1);
                }
                "}" => {
                    body.open.pop();
                    if body.open.is_empty() {
                        return Ok(());
                    }
                }
                ";" => {}
                ".reg" => self.registers(body)?,
                ".shared" | ".local" => {
                    let declared = self.declared()?;
                    self.take(b';');
                    let is_shared = token.text == ".shared";
                    let owner = body.calls.last().filter(|_| is_shared);
                    let owner = owner.map(|function| [function.clone(), declared.name.clone()]);
                    let known = owner.as_ref().and_then(|owner| body.function_shared.get(owner)).copied();
                    let at = known.unwrap_or_else(|| {
                        let space = if is_shared { &mut body.shared_bytes } else { &mut body.local_bytes };
                        let at = round_up(u64::from(*space), declared.align);
                        *space = (at + declared.bytes) as u32;
                        at
                    });
                    if let Some(owner) = owner {
                        body.function_shared.insert(owner, at);
                    }
                    body.declare(declared.name, Name::Variable(at));
                }
                ".param" => self.call_variable(body)?,
                "call" | "call.uni" => self.call(body)?,
                ".pragma" => self.skip_past(b';')?,
                text if token.kind == Kind::Word && self.peek().is_some_and(|next| next.is(b':')) => {
                    self.at += 1;
                    if self.peek().is_some_and(|next| next.text == ".branchtargets") {
                        self.at += 1;
                        let mut targets = Vec::new();
                        while !self.take(b';') {
                            targets.push(self.next("a label")?.text.to_string());
                            self.take(b',');
                        }
                        body.tables.insert(text.to_string(), targets);
                    } else {
                        body.declare(text.to_string(), Name::Label(body.statements.len() as u32));
                    }
                }
                _ => {
                    self.at -= 1;
                    let mut statement = self.statement(body)?;
                    Self::returns(body, &mut statement);
                    body.statements.push(statement);
                }
            }
        }
    }

    /// `.reg .b32 %r<10>;` or `.reg .pred p, q;`.
    fn registers(&mut self, body: &mut Body<'a>) -> Result<(), Error> {
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

    fn statement(&mut self, body: &Body<'a>) -> Result<Statement<'a>, Error> {
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

    fn number(&mut self) -> Result<u64, Error> {
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

    fn lookup(&self, body: &Body<'a>, name: &str) -> Option<Name> {
        let local = body.open.iter().rev().find_map(|scope| body.scopes[*scope].get(name));
        local.or_else(|| self.globals.get(name)).copied().filter(|name| !matches!(name, Name::Label(_)))
    }

    /// A variable of module scope, with its initial value.
    fn variable(&mut self) -> Result<(), Error> {
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
    fn declared(&mut self) -> Result<Declared, Error> {
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

    fn extents(&mut self) -> Result<[u32; 3], Error> {
        let mut extents = [1; 3];
        for extent in &mut extents {
            *extent = self.number()? as u32;
            if !self.take(b',') {
                break;
            }
        }
        Ok(extents)
    }

    fn skip_braces(&mut self) -> Result<(), Error> {
        let mut depth = 0;
        loop {
            let token = self.next("}")?;
            depth += i32::from(token.is(b'{')) - i32::from(token.is(b'}'));
            if depth == 0 && token.is(b'}') {
                return Ok(());
            }
        }
    }

    fn skip_past(&mut self, mark: u8) -> Result<(), Error> {
        while !self.next("the end of the declaration")?.is(mark) {}
        Ok(())
    }

    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).copied()
    }

    fn take(&mut self, mark: u8) -> bool {
        let found = self.peek().is_some_and(|token| token.is(mark));
        self.at += usize::from(found);
        found
    }

    fn next(&mut self, wanted: &str) -> Result<Token<'a>, Error> {
        let token = self.peek().ok_or_else(|| self.truncated(wanted))?;
        self.at += 1;
        Ok(token)
    }

    fn truncated(&self, wanted: &str) -> Error {
        let (line, text) = self.tokens.last().map_or((1, ""), |token| (token.line, token.text));
        Error::Parse {
            line,
            text: text.to_string(),
            reason: format!("the text ends here, where {wanted} should follow"),
        }
    }

    fn error(&self, token: Token<'_>, reason: &str) -> Error {
        let line = self.source[..token.start].rfind('\n').map_or(0, |at| at + 1);
        let end = self.source[token.start..].find('\n').map_or(self.source.len(), |at| token.start + at);
        Error::Parse {
            line: token.line,
            text: self.source[line..end].trim().to_string(),
            reason: format!("{reason} ({})", token.text),
        }
    }
}

#[derive(Clone, Debug)]
struct Declared {
    name: String,
    ty: Type,
    align: u64,
    bytes: u64,
}

impl Body<'_> {
    fn declare(&mut self, name: String, what: Name) {
        let scope = *self.open.last().expect("a kernel's body is a scope");
        self.scopes[scope].insert(name, what);
    }
}

fn resolve(body: &Body<'_>) -> Result<Vec<Instruction>, Error> {
    let error = |statement: &Statement<'_>, reason: String| Error::Parse {
        line: statement.line,
        text: statement.text.clone(),
        reason,
    };
    let mut instructions = Vec::with_capacity(body.statements.len() + 1);
    for statement in &body.statements {
        let label = |name: &str| {
            let found = statement.scopes.iter().rev().find_map(|scope| body.scopes[*scope].get(name));
            match found {
                Some(Name::Label(target)) => Ok(*target),
                _ => Err(format!("there is no label {name}")),
            }
        };
        let table = |name: &str| match body.tables.get(name) {
            Some(targets) => targets.iter().map(|name| label(name)).collect(),
            None => Err(format!("there is no .branchtargets {name}")),
        };
        let op = decode::decode(statement.opcode, &statement.arguments, &label, &table)
            .map_err(|reason| error(statement, reason))?;
        let Statement { guard, line, ref text, .. } = *statement;
        let class = exec::class(&op, statement.opcode);
        instructions.push(Instruction {
            guard,
            op,
            class,
            registers: named(&statement.arguments),
            moves: statement.opcode.starts_with("mov."),
            line,
            text: text.clone(),
        });
    }
    // A kernel may end without `ret`.
    let line = instructions.last().map_or(0, |last| last.line + 1);
    instructions.push(Instruction {
        guard: None,
        op: Op::Exit,
        class: Class::Control,
        registers: Vec::new(),
        moves: false,
        line,
        text: "}".into(),
    });
    Ok(instructions)
}

/// The registers that operands name.
fn named(arguments: &[Argument]) -> Vec<u32> {
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

fn round_up(value: u64, align: u64) -> u64 {
    value.next_multiple_of(align.max(1))
}
