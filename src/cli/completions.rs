//! `rerankd completions`: the script with which a shell completes commands and flags.

use clap::Command;
use clap_complete::Shell;

use super::failure::Failure;
use super::output::print;

#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// Shell that reads the script
    ///
    /// bash: rerankd completions bash > ~/.local/share/bash-completion/completions/rerankd
    ///
    /// zsh: rerankd completions zsh > FOLDER/_rerankd, with a FOLDER of $fpath
    ///
    /// fish: rerankd completions fish > ~/.config/fish/completions/rerankd.fish
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs, mut command: Command) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "rerankd", &mut script);
    print(&String::from_utf8_lossy(&script))
}
