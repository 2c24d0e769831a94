package payment

import "strings"

// MaxAmount is the most that one payment may be, in minor units of its currency:
// 99,999,999,999. It has fewer digits than any card number.
const MaxAmount = 99_999_999_999

// exponents has the active codes of ISO 4217 that money is paid in, and the
// number of digits of their minor units. Codes without minor units (metals, the
// SDR, test codes) are left out.
var exponents = func() map[string]int {
	m := make(map[string]int)
	for digits, codes := range map[int]string{
		0: `BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF`,
		3: `BHD IQD JOD KWD LYD OMR TND`,
		4: `CLF UYW`,
		2: `AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BOV BRL BSD BTN BWP
			BYN BZD CAD CDF CHE CHF CHW CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB
			EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR JMD KES
			KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR
			MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD
			RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP
			TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG`,
	} {
		for _, c := range strings.Fields(codes) {
			m[c] = digits
		}
	}
	return m
}()

// Exponent returns the number of digits of a currency's minor unit (2 for USD:
// cents), and whether the code is one that is accepted.
func Exponent(currency string) (int, bool) {
	n, ok := exponents[currency]
	return n, ok
}
