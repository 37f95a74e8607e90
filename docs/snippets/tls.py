from portico import server_context

tls_context = server_context("cert.pem", "key.pem", alpn=["http/1.1"])
