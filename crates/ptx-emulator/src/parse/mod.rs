//! PTX text to kernels: declarations, scopes, labels. What an opcode means is decided in [`decode`].

mod call;
mod declaration;
mod decode;
mod lexer;
mod statement;

use std::collections::HashMap;

use self::{
    declaration::Declared,
    lexer::{Kind, Token},
    statement::named,
};
use crate::{
    error::Error,
    exec::{self, Class},
    isa::{Address, Guard, Instruction, Op, Operand},
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

fn round_up(value: u64, align: u64) -> u64 {
    value.next_multiple_of(align.max(1))
}
