//! `pull`: fetches an image, or takes it from a file.

use anyhow::Result;
use clap::{Arg, ArgMatches};

use super::client::{Client, called, is_file_source};
use super::{Command, Context, required, string};
use crate::api::v1;

pub(super) struct Pull;

#[async_trait::async_trait]
impl Command for Pull {
    fn name(&self) -> &'static str {
        "pull"
    }
    fn about(&self) -> &'static str {
        "Fetch an image from a registry, or take it from oci:DIR, oci-archive:FILE, docker-archive:FILE or bfc:FILE"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            required("IMAGE", "Reference or file"),
            Arg::new("as").long("as").value_name("REFERENCE").help("Name for an image from a file"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let image = string(matches, "IMAGE");
        if is_file_source(&image) {
            let loaded = client.load(&image, &string(matches, "as")).await?;
            println!("{}  {}", loaded.id, loaded.repo_tags.join(" "));
        } else {
            anyhow::ensure!(!matches.contains_id("as"), "--as names an image from a file");
            let spec = v1::ImageSpec { image, ..Default::default() };
            let request = v1::PullImageRequest { image: Some(spec), ..Default::default() };
            println!("{}", called(client.image.pull_image(request).await)?.image_ref);
        }
        Ok(0)
    }
}
