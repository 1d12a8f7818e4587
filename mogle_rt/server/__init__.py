"""A server that draws on request, in the shape of OpenAI's images API, and the page to paint masks on."""
