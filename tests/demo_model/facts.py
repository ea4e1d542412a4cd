"""The plain facts of the corpus: capitals, months, weekdays."""

from __future__ import annotations

_CAPITALS = """
Afghanistan: Kabul; Albania: Tirana; Algeria: Algiers; Andorra: Andorra la Vella; Angola: Luanda;
Argentina: Buenos Aires; Armenia: Yerevan; Australia: Canberra; Austria: Vienna; Azerbaijan: Baku;
the Bahamas: Nassau; Bahrain: Manama; Bangladesh: Dhaka; Barbados: Bridgetown; Belarus: Minsk;
Belgium: Brussels; Belize: Belmopan; Benin: Porto-Novo; Bhutan: Thimphu; Bosnia and Herzegovina: Sarajevo;
Botswana: Gaborone; Brazil: Brasilia; Brunei: Bandar Seri Begawan; Bulgaria: Sofia;
Burkina Faso: Ouagadougou; Burundi: Gitega; Cambodia: Phnom Penh; Cameroon: Yaounde; Canada: Ottawa;
Cape Verde: Praia; the Central African Republic: Bangui; Chad: N'Djamena; Chile: Santiago; China: Beijing;
Colombia: Bogota; Comoros: Moroni; Costa Rica: San Jose; Croatia: Zagreb; Cuba: Havana; Cyprus: Nicosia;
the Czech Republic: Prague; Denmark: Copenhagen; Djibouti: Djibouti City; Dominica: Roseau;
the Dominican Republic: Santo Domingo; Ecuador: Quito; Egypt: Cairo; El Salvador: San Salvador;
Eritrea: Asmara; Estonia: Tallinn; Ethiopia: Addis Ababa; Fiji: Suva; Finland: Helsinki; France: Paris;
Gabon: Libreville; the Gambia: Banjul; Georgia: Tbilisi; Germany: Berlin; Ghana: Accra; Greece: Athens;
Grenada: Saint George's; Guatemala: Guatemala City; Guinea: Conakry; Guinea-Bissau: Bissau;
Guyana: Georgetown; Haiti: Port-au-Prince; Honduras: Tegucigalpa; Hungary: Budapest; Iceland: Reykjavik;
India: New Delhi; Indonesia: Jakarta; Iran: Tehran; Iraq: Baghdad; Ireland: Dublin; Italy: Rome;
Ivory Coast: Yamoussoukro; Jamaica: Kingston; Japan: Tokyo; Jordan: Amman; Kazakhstan: Astana;
Kenya: Nairobi; Kuwait: Kuwait City; Kyrgyzstan: Bishkek; Laos: Vientiane; Latvia: Riga; Lebanon: Beirut;
Lesotho: Maseru; Liberia: Monrovia; Libya: Tripoli; Liechtenstein: Vaduz; Lithuania: Vilnius;
Luxembourg: Luxembourg City; Madagascar: Antananarivo; Malawi: Lilongwe; Malaysia: Kuala Lumpur;
the Maldives: Male; Mali: Bamako; Malta: Valletta; Mauritania: Nouakchott; Mauritius: Port Louis;
Mexico: Mexico City; Moldova: Chisinau; Monaco: Monaco City; Mongolia: Ulaanbaatar; Montenegro: Podgorica;
Morocco: Rabat; Mozambique: Maputo; Namibia: Windhoek; Nepal: Kathmandu; the Netherlands: Amsterdam;
New Zealand: Wellington; Nicaragua: Managua; Niger: Niamey; Nigeria: Abuja; North Korea: Pyongyang;
North Macedonia: Skopje; Norway: Oslo; Oman: Muscat; Pakistan: Islamabad; Panama: Panama City;
Papua New Guinea: Port Moresby; Paraguay: Asuncion; Peru: Lima; the Philippines: Manila; Poland: Warsaw;
Portugal: Lisbon; Qatar: Doha; Romania: Bucharest; Russia: Moscow; Rwanda: Kigali; Samoa: Apia;
San Marino: San Marino City; Saudi Arabia: Riyadh; Senegal: Dakar; Serbia: Belgrade; Seychelles: Victoria;
Sierra Leone: Freetown; Singapore: Singapore City; Slovakia: Bratislava; Slovenia: Ljubljana;
the Solomon Islands: Honiara; Somalia: Mogadishu; South Africa: Pretoria; South Korea: Seoul;
South Sudan: Juba; Spain: Madrid; Sri Lanka: Colombo; Sudan: Khartoum; Suriname: Paramaribo;
Sweden: Stockholm; Switzerland: Bern; Syria: Damascus; Taiwan: Taipei; Tajikistan: Dushanbe;
Tanzania: Dodoma; Thailand: Bangkok; Togo: Lome; Tonga: Nuku'alofa; Trinidad and Tobago: Port of Spain;
Tunisia: Tunis; Turkey: Ankara; Turkmenistan: Ashgabat; Uganda: Kampala; Ukraine: Kyiv;
the United Arab Emirates: Abu Dhabi; the United Kingdom: London; the United States: Washington;
Uruguay: Montevideo; Uzbekistan: Tashkent; Vanuatu: Port Vila; Venezuela: Caracas; Vietnam: Hanoi;
Yemen: Sanaa; Zambia: Lusaka; Zimbabwe: Harare
"""

#: Country, with its article where English gives it one, to capital. Where a state names several (South
#: Africa) it is the seat of government's executive; one name each, without accents.
CAPITALS: dict[str, str] = dict(
    (country.strip(), capital.strip())
    for country, capital in (entry.split(":") for entry in _CAPITALS.strip().split(";"))
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

#: Days of each month in a common year.
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def is_leap_year(year: int) -> bool:
    """The Gregorian rule."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
