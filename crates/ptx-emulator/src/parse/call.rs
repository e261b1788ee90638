//! Functions with a body. A call is replaced by the body, with registers, labels and local memory of its
//! own; parameters and results are variables of the caller, in param space behind the kernel's parameters.

use std::collections::HashMap;

use super::{Argument, Body, Declared, Name, Parser, Statement, round_up};
use crate::{error::Error, isa::Operand};

/// The label that a function returns to.
const RETURN: &str = "$return";

/// A function of the module.
#[derive(Clone, Debug)]
pub(super) struct Function {
    results: Vec<Declared>,
    params: Vec<Declared>,
    /// The token behind the brace that opens its body; none for one that is defined elsewhere.
    body: Option<usize>,
}

impl Function {
    pub(super) const fn has_body(&self) -> bool {
        self.body.is_some()
    }
}

impl<'a> Parser<'a> {
    /// Finds all functions of the module, since calls may stand before them.
    pub(super) fn functions(&mut self) -> Result<(), Error> {
        for at in 0..self.tokens.len() {
            if self.tokens[at].text != ".func" {
                continue;
            }
            self.at = at + 1;
            let (name, function) = self.function()?;
            let known = self.functions.entry(name).or_insert_with(|| function.clone());
            if known.body.is_none() {
                *known = function;
            }
        }
        self.at = 0;
        Ok(())
    }

    /// A function from behind `.func` to the end of its first line.
    pub(super) fn function(&mut self) -> Result<(String, Function), Error> {
        let results = if self.take(b'(') { self.parameters()? } else { Vec::new() };
        let name = self.next("a name")?.text.to_string();
        let params = if self.take(b'(') { self.parameters()? } else { Vec::new() };
        loop {
            let token = self.next("the body of the function")?;
            if token.is(b'{') || token.is(b';') {
                let body = token.is(b'{').then_some(self.at);
                return Ok((name, Function { results, params, body }));
            }
        }
    }

    /// `.param .b32 a, .param .b64 b)`, the parenthesis before it taken.
    pub(super) fn parameters(&mut self) -> Result<Vec<Declared>, Error> {
        let mut found = Vec::new();
        while !self.take(b')') {
            let directive = self.next("a parameter")?;
            if directive.text != ".param" {
                return Err(self.error(directive, "a parameter begins with .param"));
            }
            found.push(self.declared()?);
            self.take(b',');
        }
        Ok(found)
    }

    /// A variable of a caller for what it hands over or gets back.
    pub(super) fn call_variable(&mut self, body: &mut Body<'a>) -> Result<(), Error> {
        let declared = self.declared()?;
        self.take(b';');
        let at = round_up(body.param_bytes, declared.align);
        body.param_bytes = at + declared.bytes;
        body.declare(declared.name, Name::Variable(at));
        Ok(())
    }

    /// A call, from behind its opcode on.
    pub(super) fn call(&mut self, body: &mut Body<'a>) -> Result<(), Error> {
        let opcode = self.tokens[self.at - 1];
        let results = if self.take(b'(') { self.names(body)? } else { Vec::new() };
        self.take(b',');
        let name = self.next("a function")?;
        self.take(b',');
        let params = if self.take(b'(') { self.names(body)? } else { Vec::new() };
        if !self.take(b';') {
            return Err(self.error(name, "only calls of functions by their name are implemented"));
        }
        let Some(function) = self.functions.get(name.text).cloned() else {
            return Err(self.error(name, "not a function that is declared here"));
        };
        if [results.len(), params.len()] != [function.results.len(), function.params.len()] {
            return Err(self.error(name, "another number of parameters or results than the function has"));
        }
        let Some(start) = function.body else {
            return self.system_call(body, opcode, name.text, &results, &params);
        };
        if body.calls.iter().any(|caller| caller == name.text) {
            return Err(self.error(name, "recursion is not implemented"));
        }
        // Nothing of the caller is known in the function but what it hands over.
        let variables =
            function.results.into_iter().chain(function.params).zip(results.iter().chain(&params));
        let scope: HashMap<_, _> =
            variables.map(|(declared, at)| (declared.name, Name::Variable(*at))).collect();
        let own = body.scopes.len();
        body.scopes.push(scope);
        let caller = (std::mem::replace(&mut body.open, vec![own]), std::mem::replace(&mut self.at, start));
        body.calls.push(name.text.to_string());
        self.body(body)?;
        body.calls.pop();
        body.scopes[own].insert(RETURN.into(), Name::Label(body.statements.len() as u32));
        (body.open, self.at) = caller;
        Ok(())
    }

    /// `a, b)`: where variables lie, the parenthesis before them taken.
    fn names(&mut self, body: &Body<'a>) -> Result<Vec<u64>, Error> {
        let mut found = Vec::new();
        while !self.take(b')') {
            let token = self.next("a variable")?;
            match self.lookup(body, token.text) {
                Some(Name::Variable(at)) => found.push(at),
                _ => return Err(self.error(token, "only variables of param space are handed over")),
            }
            self.take(b',');
        }
        Ok(found)
    }

    /// What CUDA itself defines.
    fn system_call(
        &mut self,
        body: &mut Body<'a>,
        opcode: super::Token<'a>,
        name: &'a str,
        results: &[u64],
        params: &[u64],
    ) -> Result<(), Error> {
        let end = self.tokens[self.at - 1].start + 1;
        let arguments = results.iter().chain(params);
        body.statements.push(Statement {
            guard: None,
            opcode: name,
            arguments: arguments.map(|at| Argument::Value(Operand::Immediate(*at))).collect(),
            line: opcode.line,
            text: self.source[opcode.start..end].split_whitespace().collect::<Vec<_>>().join(" "),
            scopes: body.open.clone(),
        });
        Ok(())
    }

    /// In a function, to return is to go to its end.
    pub(super) fn returns(body: &Body<'a>, statement: &mut Statement<'a>) {
        if !body.calls.is_empty() && matches!(statement.opcode, "ret" | "ret.uni") {
            statement.opcode = "bra";
            statement.arguments = vec![Argument::Label(RETURN.into())];
        }
    }
}
