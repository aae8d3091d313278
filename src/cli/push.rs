//! `push`: copies an image to a registry.

use anyhow::Result;
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::output::print;
use super::{Command, Context, required, string};
use crate::api::local;

pub(super) struct Push;

#[async_trait::async_trait]
impl Command for Push {
    fn name(&self) -> &'static str {
        "push"
    }
    fn about(&self) -> &'static str {
        "Copy an image to a registry: from its own one, all platforms, as it is; or, where it has none, from this node"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            required("IMAGE", "Reference or id; what is not here is asked for at its registry"),
            required("TARGET", "Its name there, with a tag"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let request = local::PushImageRequest { source: string(matches, "IMAGE"), target: string(matches, "TARGET") };
        let done = called(client.local.push_image(request).await)?;
        let local::PushImageResponse { name, digest, from, sent, bytes, there } = done;
        print(&format!("{name}  {digest}\nfrom {from}: {sent} blobs sent ({bytes} bytes), {there} were there\n"))?;
        Ok(0)
    }
}
