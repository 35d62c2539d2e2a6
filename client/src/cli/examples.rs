//! What help shows: each of these is run by a test (`tests/help.rs`). No line is longer than a narrow terminal.

pub(super) const SIGN: &str = "\
Examples:
  omsign sign my-model --key release
  omsign sign my-model --key-uri 'piv:serial=11223344;slot=9c'
  omsign sign my-model --private-key release.key --signature my-model.sig
  omsign digest my-model --json | omsign sign --manifest - --key release";

pub(super) const COMPLETIONS: &str = "\
Examples:
  omsign completions bash \\
      > ~/.local/share/bash-completion/completions/omsign
  omsign completions zsh > ~/.zfunc/_omsign
  omsign completions fish > ~/.config/fish/completions/omsign.fish";

pub(super) const VERIFY: &str = "\
Examples:
  omsign verify my-model --public-key release.pem
  omsign verify my-model --certificate-chain root.pem \\
      --certificate-identity 'CN=Model Release'
  omsign verify my-model --identity release@example.com \\
      --identity-provider https://accounts.example.com
  omsign trust add release --public-key release.pem && omsign verify my-model
  omsign verify my-model --public-key release.pem \\
      --partial config.json tokenizer";

pub(super) const DIGEST: &str = "\
Examples:
  omsign digest my-model
  omsign digest my-model --serialization shards --json > manifest.json
  omsign digest my-model --part 2/8 --json > part-2.json";

pub(super) const TRUST: &str = "\
Examples:
  omsign trust add release --public-key release.pem --models 'my-*'
  omsign trust add ci --identity-pattern 'https://github.com/acme/**' \\
      --identity-provider https://token.actions.githubusercontent.com
  omsign trust test model.sig
  omsign trust remove release";
