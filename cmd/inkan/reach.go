package main

import (
	"crypto/tls"
	"errors"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"inkan/signer/client"
)

// signerFlags say where the signer is: on this host, or with --url on another.
func signerFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{
		socketFlag(),
		&cli.StringFlag{Name: "url", Usage: "`URL` of a signer on another host, such as https://signer.example.org:8444; then --signer-ca, and --svid with --svid-key or --jwt-file"},
		&cli.StringFlag{Name: "signer-ca", Usage: "PEM `FILE` with the authorities of that signer's certificate"},
		&cli.StringFlag{Name: "svid", Usage: "PEM `FILE` with this workload's X.509-SVID"},
		&cli.StringFlag{Name: "svid-key", Usage: "PEM `FILE` with its private key"},
		&cli.StringFlag{Name: "jwt-file", Usage: "`FILE` with a JWT-SVID, read again for each request"},
	}, more...)
}

// theSigner returns the client that the flags ask for.
func theSigner(c *cli.Context) (*client.Client, error) {
	url := c.String("url")
	if url == "" {
		for _, f := range []string{"signer-ca", "svid", "svid-key", "jwt-file"} {
			if c.String(f) != "" {
				return nil, usage("--%s is for a signer on another host: --url is missing", f)
			}
		}
		// Under inkan run the connection is there already, and there is no other.
		if os.Getenv(client.Variable) != "" && !c.IsSet("socket") {
			return client.FromEnv()
		}
		return client.New(c.String("socket")), nil
	}
	ca, err := required(c, "signer-ca")
	if err != nil {
		return nil, err
	}
	config := new(tls.Config)
	if config.RootCAs, err = readPool(ca); err != nil {
		return nil, err
	}
	svid, key, jwt := c.String("svid"), c.String("svid-key"), c.String("jwt-file")
	switch {
	case (svid == "") != (key == ""), (svid == "") == (jwt == ""):
		return nil, usage("--svid with --svid-key, or --jwt-file is expected")
	case jwt != "":
		return client.NewRemote(url, config, func() (string, error) {
			b, err := os.ReadFile(jwt)
			if err != nil {
				return "", err
			}
			token := strings.TrimSpace(string(b))
			if token == "" || strings.ContainsAny(token, " \n\r") {
				return "", errors.New("the file does not hold one token")
			}
			return token, nil
		})
	}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(svid, key) // anew for each connection: SVIDs live shortly
		return &pair, err
	}
	return client.NewRemote(url, config, nil)
}
