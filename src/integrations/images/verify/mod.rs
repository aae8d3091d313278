//! Which images may be pulled: a policy by repository, and what it asks for: signatures by known keys, or what programs say.
//!
//! Called by pulls when the digest is known and before anything of the image is fetched. The policy is read at each pull, so that
//! changes count at once; one that can't be read refuses all. Everything here fails closed and names the policy's rule. Keeps
//! nothing on disk.

mod cosign;
mod plugins;
mod policy;

use camino::Utf8PathBuf;

use super::Inner;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::RegistryAuth;
use crate::core::reference::Reference;

use policy::{Policy, Require, Rule};

/// What is to be verified.
pub(super) struct Subject<'a> {
    pub reference: &'a Reference,
    /// Of the manifest or index.
    pub digest: &'a Digest,
    pub size: u64,
    pub media_type: &'a str,
}

/// Whose word it was.
struct Named {
    file: Utf8PathBuf,
    rule: Rule,
}

impl Named {
    fn refused(&self, why: impl std::fmt::Display) -> Error {
        Error::new(Kind::Untrusted, format!("policy {}, {}: {why}", self.file, self.rule.name))
    }
}

impl Inner {
    /// The rule for an image's repository; None: there is no policy.
    async fn rule(&self, reference: &Reference) -> Result<Option<Named>> {
        let Some(file) = self.config.policy_file.clone() else { return Ok(None) };
        let name = reference.name();
        let rule = blocking(move || {
            let policy =
                Policy::read(&file).map_err(|e| Error::because(Kind::Untrusted, format!("policy {file}"), e))?;
            Ok(Named { rule: policy.rule(&name), file })
        });
        rule.await.map(Some)
    }

    /// Whether the policy wants to see the image again, though its name is known here.
    pub(super) async fn admits_unseen(&self, reference: &Reference) -> Result<bool> {
        let Some(named) = self.rule(reference).await? else { return Ok(true) };
        match named.rule.require {
            Require::Accept => Ok(true),
            Require::Reject => Err(named.refused(format!("{} is not to be pulled", reference.name()))),
            Require::Cosign { .. } | Require::Plugins { .. } => Ok(false),
        }
    }

    /// Fails unless the policy admits the image.
    pub(super) async fn admit(&self, subject: &Subject<'_>, auth: Option<&RegistryAuth>) -> Result<()> {
        let Some(named) = self.rule(subject.reference).await? else { return Ok(()) };
        match &named.rule.require {
            Require::Accept => Ok(()),
            Require::Reject => Err(named.refused(format!("{} is not to be pulled", subject.reference.name()))),
            Require::Plugins { dir, timeout } => {
                plugins::ask(dir, *timeout, subject).await.map_err(|e| named.refused(e.chain()))
            }
            Require::Cosign { keys } => {
                let keys = keys.clone();
                let keys = blocking(move || cosign::load(&keys)).await.map_err(|e| named.refused(e.chain()))?;
                cosign::verify(&self.registry, subject, &keys, auth).await.map_err(|e| match e.kind() {
                    // A registry that is away is no verdict: who asks again may be admitted.
                    Kind::Unavailable | Kind::DeadlineExceeded | Kind::ResourceExhausted => {
                        e.context(format!("policy {}, {}", named.file, named.rule.name))
                    }
                    _ => named.refused(e.chain()),
                })
            }
        }
    }

    /// The same for what comes from no registry: nobody vouches for it there.
    pub(super) async fn admit_local(&self, reference: &Reference) -> Result<()> {
        match self.rule(reference).await? {
            None | Some(Named { rule: Rule { require: Require::Accept, .. }, .. }) => Ok(()),
            Some(named) => Err(named.refused(format!("{} comes from no registry", reference.name()))),
        }
    }
}
