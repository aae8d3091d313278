//! `tag`, `pin` and `unpin`: what an image is called, and whether it may be collected.

use anyhow::Result;
use clap::ArgMatches;

use super::client::{Client, called};
use super::output::say;
use super::{Command, Context, required, string};
use crate::api::local;

pub(super) struct Tag;

#[async_trait::async_trait]
impl Command for Tag {
    fn name(&self) -> &'static str {
        "tag"
    }
    fn about(&self) -> &'static str {
        "Give an image one more name; an image that had it loses it"
    }
    fn arguments(&self) -> Vec<clap::Arg> {
        vec![required("IMAGE", "Reference or id"), required("NAME", "With or without a tag (latest)")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let request = local::TagImageRequest { image: string(matches, "IMAGE"), name: string(matches, "NAME") };
        print(called(client.local.tag_image(request).await)?.image)?;
        Ok(0)
    }
}

/// `pin` or `unpin`.
pub(super) struct Pin(pub(super) bool);

#[async_trait::async_trait]
impl Command for Pin {
    fn name(&self) -> &'static str {
        if self.0 { "pin" } else { "unpin" }
    }
    fn about(&self) -> &'static str {
        match self.0 {
            true => "Keep an image from the kubelet's garbage collection and from `prune`",
            false => "Let an image be collected again",
        }
    }
    fn arguments(&self) -> Vec<clap::Arg> {
        vec![required("IMAGE", "Reference or id")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let request = local::PinImageRequest { image: string(matches, "IMAGE"), pinned: self.0 };
        print(called(client.local.pin_image(request).await)?.image)?;
        Ok(0)
    }
}

fn print(image: Option<local::LoadedImage>) -> Result<()> {
    let image = image.unwrap_or_default();
    say!("{}  {}", image.id, image.repo_tags.join(" "))
}
