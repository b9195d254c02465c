"""Shell completion of `fsdfm`: commands, their flags, and config files.

    fsdfm completion bash > ~/.local/share/bash-completion/completions/fsdfm
    fsdfm completion zsh >> ~/.zshrc

The script holds all names, so that the shell starts no Python to complete a word. Print it again
after an update.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping

SHELLS = ("bash", "zsh")

_SCRIPT = r"""# In zsh, compgen looks for the files that begin with PREFIX.
_fsdfm_names() { PREFIX=$word; compgen -P "$prefix" "$@" -- "$word"; }
_fsdfm() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} flag='' prefix='' flags=''
  COMPREPLY=()
  case ${COMP_WORDS[1]} in
@CASES@
  esac
  # bash makes three words of --flag=value, zsh one.
  if [[ $word == '=' ]]; then flag=$before word=''
  elif [[ $before == '=' ]]; then flag=${COMP_WORDS[COMP_CWORD-2]}
  elif [[ $word == --*=* ]]; then flag=${word%%=*} prefix=${word%%=*}= word=${word#*=}
  elif [[ $before == --config ]]; then flag=--config
  fi
  if ((COMP_CWORD == 1)); then COMPREPLY=($(compgen -W '@COMMANDS@' -- "$word"))
  elif [[ ${COMP_WORDS[1]} == completion ]]; then COMPREPLY=($(compgen -W 'bash zsh' -- "$word"))
  elif [[ $flag == --config ]]; then
    COMPREPLY=($(_fsdfm_names -W '@CONFIGS@') $(_fsdfm_names -f -X '!*.py') $(_fsdfm_names -d -S /))
    compopt -o nospace 2> /dev/null
  elif [[ -n $flag || $word != -* ]]; then
    COMPREPLY=($(_fsdfm_names -f))
    compopt -o filenames 2> /dev/null
  else
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
  fi
}
"""
_REGISTER = {
    "bash": "complete -F _fsdfm fsdfm\n",
    "zsh": "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"
    "complete -o nospace -F _fsdfm fsdfm\n",
}
# Of --helpfull: the modules whose flags are ours; a program's own stand under its path.
_OURS = re.compile(r"(fsdfm_jax|launch|ml_collections)\b|.*/")


def script(shell: str, commands: Iterable[str], configs: Iterable[str]) -> str:
    """The completion script of a shell.

    Args:
      shell: one of `SHELLS`.
      commands: of `fsdfm`; each is run once to ask for its flags.
      configs: names of config files that every program finds.

    Raises:
      ValueError: for another shell.
    """
    if shell not in SHELLS:
        raise ValueError(f"completion is for {' or '.join(SHELLS)}, got {shell!r}")
    flags = _flags(list(commands))
    cases = [f"    {name}) flags='{' '.join(flags[name])}' ;;" for name in flags]
    text = _SCRIPT.replace("@CASES@", "\n".join(cases))
    text = text.replace("@COMMANDS@", " ".join([*flags, "completion"]))
    return text.replace("@CONFIGS@", " ".join(configs)) + _REGISTER[shell]


def _flags(commands: Iterable[str]) -> Mapping[str, list[str]]:
    """The flags of each command, with "=" after those that take a value."""
    run = lambda name: [sys.executable, "-m", "fsdfm_jax", name, "--helpfull"]
    asked = {
        name: subprocess.Popen(run(name), stdout=subprocess.PIPE, text=True) for name in commands
    }
    return {name: parse_flags(process.communicate()[0]) for name, process in asked.items()}


def parse_flags(text: str) -> list[str]:
    """The project's flags in what absl prints for --helpfull.

    >>> parse_flags("absl.app:\\n  --[no]pdb: x\\nfsdfm_jax.cli:\\n  --[no]fast: x\\n  --seed: x")
    ['--fast', '--help', '--seed=']
    """
    flags, ours = {"--help"}, False
    for line in text.splitlines():
        if re.match(r"\S.*:$", line):
            ours = bool(_OURS.match(line))
        elif ours and (found := re.match(r"  --(\[no\])?([\w.]+):", line)):
            flags.add(f"--{found[2]}" + ("" if found[1] else "="))
    return sorted(flags)
