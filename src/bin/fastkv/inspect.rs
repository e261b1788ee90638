use anyhow::Result;
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {}
pub(crate) fn run(_: &Arguments, _: &fastkv::engine::Cancel) -> Result<()> { Ok(()) }
