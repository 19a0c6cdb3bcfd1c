//! Manual pages and shell completions, generated from the command-line definitions.

use std::{fs, io, path::Path};

use clap::Command;
pub use clap_complete::Shell;

/// The completion script of `shell` for this command.
#[must_use]
pub fn completions(command: &mut Command, shell: Shell) -> String {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, command, name, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes a page for the command and one for each of its subcommands, `NAME.1` and `NAME-SUBCOMMAND.1`, into `folder`,
/// which is made if there is none.
///
/// # Errors
/// When the folder or a page cannot be written.
pub fn man_pages(command: Command, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(command, folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        Command::new("tool").about("A tool").subcommand(Command::new("look").about("Looks"))
    }

    #[test]
    fn every_shell_gets_a_script_and_every_command_a_page() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            assert!(completions(&mut command(), shell).contains("look"), "{shell}");
        }
        let folder = tempfile::tempdir().unwrap();
        man_pages(command(), folder.path()).unwrap();
        assert!(fs::read_to_string(folder.path().join("tool.1")).unwrap().contains("A tool"));
        assert!(fs::read_to_string(folder.path().join("tool-look.1")).unwrap().contains("Looks"));
    }
}
