package attester

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"

	"inkan/attest"
	"inkan/internal/certext"
)

// Declare has the issuer certify an agent's key in an HSM, on a host that has
// no TPM. Nothing but the key is proven.
func Declare(ctx context.Context, issuer Issuer, agent string, key crypto.Signer) (*Outcome, error) {
	ch, err := Dial(ctx, issuer.URL, issuer.Roots)
	if err != nil {
		return nil, err
	}
	defer ch.Close()
	binding, err := ch.Binding()
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: agent}, ExtraExtensions: []pkix.Extension{{Id: certext.OIDChannel, Value: binding}}}, key)
	if err != nil {
		return nil, err
	}
	var out Outcome
	return &out, ch.Post(ctx, "/v1/declarations", &attest.Declaration{Agent: agent, CSR: csr}, &out.Grant)
}
