package gate_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log"
	"net"
	"net/url"
	"time"

	"inkan/scope"
	"inkan/verify"
	"inkan/verify/gate"
	"inkan/verify/message"
)

// A venue whose order entry takes JSON at POST /orders.
func Example() {
	var roots *x509.CertPool // the issuer's CA certificate
	ctx := context.Background()
	seen, err := verify.OpenSQLiteStore(ctx, "/var/lib/gate/seen.db")
	if err != nil {
		log.Fatal(err)
	}
	g, err := gate.New(gate.Config{
		Receiver: verify.Config{
			Audiences:  []string{"XPAR"},
			Roots:      roots,
			Revocation: &verify.CRL{Load: verify.HTTPLoader("http://issuer.example.org/crl"), MaxAge: time.Hour},
			Replay:     seen,
		},
		Routes: []message.Route{{
			Method: "POST", Path: "/orders", Kinds: []scope.Kind{scope.OrderNew},
			Body: map[string]message.Member{
				"clientId": {Field: "ord.ClOrdID"},
				"isin":     {Field: "ord.SecurityID"},
				"side":     {Field: "ord.Side", Values: map[string]string{"buy": "1", "sell": "2"}},
				"quantity": {Field: "ord.OrderQty"},
				"limit":    {Field: "ord.Price"},
			},
			Implied: map[string]string{"ord.SecurityIDSource": "4", "ord.OrdType": "2", "ord.Currency": "EUR", "ord.TimeInForce": "0"},
		}},
		TrustDomain: "example.org",
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := tls.LoadX509KeyPair("/etc/gate/cert.pem", "/etc/gate/key.pem")
			return &c, err
		},
		Backend: &url.URL{Scheme: "http", Host: "127.0.0.1:8080"},
	})
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", ":8443")
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(g.Serve(ctx, l))
}
