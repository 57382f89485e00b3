//! `rerankd man`: the manual pages, made from the definition of the command line.

use std::path::PathBuf;

use anyhow::Context;
use clap::Command;
use clap_mangen::Man;

use super::failure::Failure;
use super::output::print;

#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Folder for a page of each command, for example ~/.local/share/man/man1 [default: print the main page]
    ///
    /// To read the main page without writing a file: rerankd man | man -l -
    #[arg(value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

pub(super) fn run(args: &ManArgs, command: Command) -> Result<(), Failure> {
    let Some(folder) = &args.folder else {
        let mut page = Vec::new();
        Man::new(command).render(&mut page).context("cannot make the page").map_err(Failure::Other)?;
        return print(&String::from_utf8_lossy(&page));
    };
    std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(command, folder))
        .with_context(|| format!("cannot write manual pages to {}", folder.display()))
        .map_err(Failure::Other)
}
