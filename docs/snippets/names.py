from portico import Certificates

certificates = Certificates(
    "cert.pem",
    "key.pem",
    sni={
        "example.org": ("example.org.pem", "example.org.key"),
        "*.example.org": ("star.example.org.pem", "star.example.org.key"),
    },
)
